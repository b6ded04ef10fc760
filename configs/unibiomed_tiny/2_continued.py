"""unibiomed-tiny, second run: on from the first with smaller changes of the images.

An hour and a half on two CPU cores; 3_large.py goes on from its result.
"""

from configs.unibiomed_tiny.shared import GENTLE, datasets, run
from unibiomed_jax.training.config import OptimConfig

config = run(
    "2_continued",
    after="1_base",
    data=datasets("train"),
    seed=43,
    augment=GENTLE,
    image_size=128,
    optim=OptimConfig(lr=5e-4, steps=18_000, warmup=0.02, beta2=0.99, accumulate=1),
)
