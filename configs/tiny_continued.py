"""unibiomed-tiny, second run: on from the result of configs/tiny.py with smaller changes of the images.

An hour and a half on two CPU cores; configs/tiny_large.py goes on from its result.
"""

import dataclasses
import runpy
from pathlib import Path

from unibiomed_jax.data.augment import AugmentConfig

first = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["config"]

config = dataclasses.replace(
    first,
    folder="runs/tiny_continued",
    initial=f"{first.folder}/model",
    data=dataclasses.replace(
        first.data,
        # So small a model did not fit images changed as much as in the first run.
        sample=dataclasses.replace(
            first.data.sample, augment=AugmentConfig(rotation=10, zoom=1.2, shift=0.05, light=0.25)
        ),
        seed=43,
    ),
    # The words are known.
    loss=dataclasses.replace(first.loss, masks_from=0),
    optim=dataclasses.replace(first.optim, steps=18000),
)
