"""What a validation reports, worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from unibiomed_jax.training.config import LossConfig, TrainConfig
from unibiomed_jax.training.forward import LossCounts, LossSums
from unibiomed_jax.training.losses import MASK_EPS
from unibiomed_jax.training.validation import Measured, summarise

KINDS = {"liver": "segmentation", "lung": "segmentation", "box": "region", "polyp": "disease"}
CONFIG = TrainConfig(loss=LossConfig(mask_weight=2.0, dice_weight=0.5, num_points=10))


def measured(sums, counts, right, dice, dice_valid):
    """One batch; two objects in two frames a row."""
    return Measured(
        LossSums(*map(np.float32, sums)),
        LossCounts(*map(np.int32, counts)),
        jnp.array(right),
        jnp.array(dice, np.float32).reshape(-1, 2, 2),
        jnp.array(dice_valid, bool).reshape(-1, 2, 2),
        masks=None,
    )


def test_dice_is_of_the_right_masks_and_answers_are_of_named_rows():
    first = measured(
        sums=(6.0, 30.0, 0.6),
        counts=(3, 1),
        right=[False, True, True],  # the last row only pads the batch
        dice=[[0.5, 0.9, 0.7, 0.1], [0.1, 0.1, 0.1, 0.1], [1, 1, 1, 1]],
        dice_valid=[[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    )
    second = measured(
        sums=(2.0, 10.0, 0.2),
        counts=(1, 1),
        right=[True, False],
        dice=[[0.2, 1, 0.6, 1], [0.8, 0, 0, 0]],
        dice_valid=[[1, 0, 1, 0], [1, 0, 0, 0]],
    )
    found = summarise([(first, ("liver", "box", "")), (second, ("lung", "polyp"))], KINDS, CONFIG)
    assert found == pytest.approx(
        {
            "loss_tokens": 8 / 4,
            "loss_mask": 2 * 40 / (2 * 10 + MASK_EPS),
            "loss_dice": 0.5 * 0.8 / (2 + MASK_EPS),
            "loss": 6.2 - 3e-5,  # MASK_EPS takes 2e-5 of 4 and 1e-5 of 0.2
            "dice": (0.5 + 0.9 + 0.2 + 0.6 + 0.8) / 5,
            "dice/segmentation": (0.5 + 0.9 + 0.2 + 0.6) / 4,
            "dice/disease": 0.8,
            "answers/segmentation": 1 / 2,
            "answers/region": 1,
            "answers/disease": 0,
        },
        rel=1e-5,
    )


def test_a_validation_without_batches_measures_nothing():
    assert summarise([], KINDS, CONFIG) == {}
