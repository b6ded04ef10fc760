"""unibiomed-tiny, fifth run: on from the fourth, the memory between slices alone.

A quarter of an hour on two CPU cores; its result is checkpoints/unibiomed-tiny (docs/unibiomed_tiny.md).
Answers about single images stay as they were, to the bit.
"""

import dataclasses

from configs.unibiomed_tiny.shared import GENTLE, datasets, name_of, run
from unibiomed_jax.data.records import Kind
from unibiomed_jax.training.config import OptimConfig

# Volumes of several patients; those of one patient with many organs count less.
REPEATS = {"sarcoma_ct": 4, "sarcoma_mri": 4, "sarcoma_pet": 2}

config = run(
    "5_volumes",
    after="4_fine",
    # Three slices that are shown and three that are followed.
    data=tuple(
        dataclasses.replace(dataset, slices=6, repeats=REPEATS.get(name_of(dataset), 1))
        for dataset in datasets("train")
        if dataset.kind is Kind.SEQUENCE
    ),
    seed=46,
    augment=GENTLE,
    image_size=384,
    batch_size=2,
    dice_weight=4.0,
    # The fourth run changed the maps that memories are made of, and saw few volumes: following was lost.
    trainable=(
        "sam2.maskmem_tpos_enc",
        "sam2.memory_attention.*",
        "sam2.memory_encoder.*",
        "sam2.no_obj_ptr",
        "sam2.obj_ptr_proj.*",
    ),
    optim=OptimConfig(lr=1e-3, steps=150, warmup=0.02, beta2=0.99, accumulate=1),
)
