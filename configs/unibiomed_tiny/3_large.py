"""unibiomed-tiny, third run: on from the second, masks from 256 x 256 pixels, images mirrored.

Under two hours on two CPU cores; 4_fine.py goes on from its result.
"""

from configs.unibiomed_tiny.shared import GENTLE, mirrored_datasets, run
from unibiomed_jax.training.config import OptimConfig

config = run(
    "3_large",
    after="2_continued",
    data=mirrored_datasets(),
    seed=44,
    augment=GENTLE,
    image_size=256,
    optim=OptimConfig(lr=5e-4, steps=11_500, warmup=0.02, beta2=0.99, accumulate=1),
)
