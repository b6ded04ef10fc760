"""How well a mask fits the truth, by hand."""

import numpy as np
import pytest

from unibiomed_jax.masks.measures import dice_score


def test_dice_counts_the_overlap_twice():
    truth = np.array([[1, 1, 1, 0]], bool)
    assert dice_score(np.array([[1, 0, 0, 1]], bool), truth) == pytest.approx(2 * 1 / (2 + 3))
    assert dice_score(~truth, truth) == 0
    assert dice_score(truth, truth) == 1
    assert dice_score(truth & False, truth) == 0
    assert dice_score(truth & False, truth & False) == 1


def test_every_mask_of_a_stack_is_measured_by_itself():
    truth = np.zeros((2, 3, 4, 4), bool)
    truth[0, 1, :2] = truth[1, 2] = True
    found = np.zeros_like(truth)
    found[0, 1, 1:3] = found[1, 0] = True
    np.testing.assert_allclose(dice_score(found, truth), [[1, 0.5, 1], [0, 1, 0]])
