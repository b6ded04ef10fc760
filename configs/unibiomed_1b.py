"""UniBiomed as published: InternVL2.5-1B and SAM2 Hiera-L, adapters of rank 128, on the paper's datasets.

`initial` is made by: python -m convert.from_torch InternVL2_5-1B runs/start --sam2 sam2_hiera_large.pt
"""

from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.readers import find_datasets
from unibiomed_jax.inference.precision import BFLOAT16
from unibiomed_jax.training.config import CheckpointConfig, OptimConfig, TrainConfig

config = TrainConfig(
    folder="runs/unibiomed_1b",
    initial="runs/start",
    precision=BFLOAT16,
    # 128 samples an update, whatever the number of devices: the published run had 8 of them, 4 samples each.
    data=PipelineConfig(datasets=find_datasets("data/Biomed"), batch_size=32, workers=8),
    optim=OptimConfig(lr=4e-5, steps=100_000, warmup=0.05, accumulate=4),
    checkpoint=CheckpointConfig(every=125),
)
