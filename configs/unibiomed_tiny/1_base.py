"""unibiomed-tiny, first run: from random parameters; all of the model trains.

An hour and three quarters on two CPU cores; 2_continued.py goes on from its result, and
docs/unibiomed_tiny.md says what came out.
"""

from configs.unibiomed_tiny.shared import datasets, run
from unibiomed_jax.data.augment import AugmentConfig
from unibiomed_jax.training.config import OptimConfig

config = run(
    "1_base",
    after=None,
    data=datasets("train"),
    seed=42,
    augment=AugmentConfig(rotation=25, zoom=1.35, shift=0.1, light=0.3),
    image_size=128,
    # The words come first.
    masks_from=500,
    optim=OptimConfig(lr=5e-4, steps=20_000, warmup=0.02, beta2=0.99, accumulate=1),
)
