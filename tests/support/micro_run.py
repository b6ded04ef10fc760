"""The experiment that the tests of train.py run; MICRO_DATA names a folder of 2-D segmentation."""

import dataclasses
import os

from places import MICRO
from small import MODEL, STEP

from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.training.config import CheckpointConfig, LogConfig, OptimConfig

DATA = os.environ["MICRO_DATA"]
# Trained byte by byte.
LANGUAGE = dataclasses.replace(MODEL.language, vocab_size=292)

config = dataclasses.replace(
    STEP,
    model=dataclasses.replace(MODEL, language=LANGUAGE, max_tiles=1),
    tokenizer=str(MICRO),
    data=PipelineConfig(
        datasets=find_datasets(DATA, "train", balance_to=0),
        batch_size=2,
        buckets=BucketConfig(tiles=(1,), text=(512,)),
    ),
    validation=find_datasets(DATA, "val", balance_to=0),
    loss=dataclasses.replace(STEP.loss, token_chunk=128),
    optim=OptimConfig(lr=1e-3, steps=60, accumulate=1, ema=0.9),
    checkpoint=CheckpointConfig(every=2, save_frozen=True),
    log=LogConfig(every=1, validate_every=0, tensorboard=False),
)
