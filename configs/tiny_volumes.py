"""unibiomed-tiny, fifth run: on from the result of configs/tiny_fine.py, the memory between slices alone.

A quarter of an hour on two CPU cores; its result is checkpoints/unibiomed-tiny (docs/unibiomed_tiny.md).
Answers about single images stay as they were, to the bit.
"""

import dataclasses
import runpy
from pathlib import Path

from unibiomed_jax.data.records import Kind
from unibiomed_jax.training.config import FreezeConfig

HERE = Path(__file__).parent
first = runpy.run_path(str(HERE / "tiny.py"))["config"]
fourth = runpy.run_path(str(HERE / "tiny_fine.py"))["config"]

# Volumes of several patients; those of one patient with many organs count less.
REPEATS = {"sarcoma_ct": 4, "sarcoma_mri": 4, "sarcoma_pet": 2}

config = dataclasses.replace(
    fourth,
    folder="runs/tiny_volumes",
    initial=f"{fourth.folder}/model",
    data=dataclasses.replace(
        fourth.data,
        # Three slices that are shown and three that are followed.
        datasets=tuple(
            dataclasses.replace(dataset, slices=6, repeats=REPEATS.get(Path(dataset.root).name, 1))
            for dataset in first.data.datasets
            if dataset.kind is Kind.SEQUENCE
        ),
        batch_size=2,
        seed=46,
    ),
    # The fourth run changed the maps that memories are made of, and saw few volumes: following was lost.
    freeze=FreezeConfig(
        trainable=(
            "sam2.maskmem_tpos_enc",
            "sam2.memory_attention.*",
            "sam2.memory_encoder.*",
            "sam2.no_obj_ptr",
            "sam2.obj_ptr_proj.*",
        ),
        frozen_dtype="float32",
    ),
    optim=dataclasses.replace(fourth.optim, lr=1e-3, steps=150),
)
