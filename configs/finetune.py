"""Go on from a converted checkpoint with your own data (docs/train_on_your_data.md).

python train.py configs/finetune.py --initial CHECKPOINT --folder runs/mine
"""

from unibiomed_jax.config.precision import find_precision
from unibiomed_jax.data.mixture import find_datasets, find_validation
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.training.config import CheckpointConfig, LogConfig, LoraConfig, OptimConfig, TrainConfig

# A folder of datasets with tables for `train`, and for `val` unless there are too few patients.
DATASET = "data/mine"

config = TrainConfig(
    folder="runs/finetune",
    initial="runs/start",
    precision=find_precision("auto"),
    data=PipelineConfig(datasets=find_datasets(DATASET, "train", balance_to=0), batch_size=4),
    validation=find_validation(DATASET, "val", balance_to=0, repeats=1),
    # Adapters train, with embeddings, projectors and mask decoder (FreezeConfig). Full fine-tuning instead:
    # lora=LoraConfig(rank=0), freeze=FreezeConfig(trainable=("*",)),
    lora=LoraConfig(rank=16, alpha=32.0),
    optim=OptimConfig(lr=1e-4, steps=1000, warmup=0.05, accumulate=4),
    checkpoint=CheckpointConfig(every=100),
    log=LogConfig(validate_every=100),
)
