"""Six updates of unibiomed-tiny on one dataset: an experiment is a Python file with a `config`.

    python examples/train.py

The same as `python train.py examples/train.py`. Writes runs/example/: the log, checkpoints, the
trained model.
"""

import subprocess
import sys
from pathlib import Path

from unibiomed_jax.config.model import ModelConfig, Sam2Config
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.prompts import PromptConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.transforms import SampleConfig
from unibiomed_jax.training.config import FreezeConfig, LogConfig, LoraConfig, OptimConfig, TrainConfig

ROOT = Path(__file__).parents[1]
# What the model was trained to say; what continues a released model is the default.
PROMPTS = PromptConfig(turn="inference", phrase_marks="special", name_target=True)

config = TrainConfig(
    folder="runs/example",
    initial=str(ROOT / "checkpoints" / "unibiomed-tiny"),
    # The checkpoint brings its sizes; the masks' may be another one: small, to be quick.
    model=ModelConfig(sam2=Sam2Config(image_size=128)),
    data=PipelineConfig(
        datasets=(DatasetConfig(Kind.SEGMENTATION, str(ROOT / "sample_data" / "octa_faz"), balance_to=0),),
        sample=SampleConfig(prompts=PROMPTS),
        batch_size=4,
    ),
    # What trains, by the names of parameters: the bridge from words to masks, and no adapters.
    lora=LoraConfig(rank=0),
    freeze=FreezeConfig(trainable=("text_hidden_fcs.*",), frozen=()),
    optim=OptimConfig(lr=1e-3, steps=6, accumulate=1),
    log=LogConfig(every=1, validate_every=0, tensorboard=False),
)

if __name__ == "__main__":
    sys.exit(subprocess.run([sys.executable, str(ROOT / "train.py"), __file__]).returncode)
