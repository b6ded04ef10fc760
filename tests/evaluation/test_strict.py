"""Masks by the strict protocol: the empty cases one by one, and what must hold for any masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unibiomed_jax.evaluation.records import Sample, encode_masks
from unibiomed_jax.evaluation.strict import NotComparable, assigned_dice, score_masks, score_pair

SPACING = (5.0, 0.5, 0.5)


def box(shape=(4, 10, 12), start=(1, 2, 3), size=(2, 4, 5)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return mask


def test_both_empty_is_right():
    empty = box() & False
    assert score_pair(empty, empty, SPACING) == {
        "dice": 1,
        "iou": 1,
        "absent_correct": 1,
        "false_positive_mm3": 0,
        "nsd_1mm": 1,
        "nsd_2mm": 1,
        "nsd_3mm": 1,
        "hd95_mm": 0,
        "hd95_penalised_mm": 0,
    }


def test_nothing_found():
    found = score_pair(box(), box() & False, SPACING)
    assert "hd95_mm" not in found and "absent_correct" not in found
    assert found["dice"] == found["iou"] == found["dice_present"] == found["nsd_2mm"] == 0
    assert found["hd95_penalised_mm"] == pytest.approx(np.sqrt(20**2 + 5**2 + 6**2))


def test_found_what_is_not_there():
    found = score_pair(box() & False, box(), SPACING)
    assert "dice_present" not in found and "hd95_mm" not in found
    assert found["dice"] == found["absent_correct"] == found["nsd_1mm"] == 0
    assert found["false_positive_mm3"] == 40 * 5 * 0.5 * 0.5
    assert score_pair(box()[0] & False, box()[1], None)["false_positive_px"] == 20
    assert score_pair(box() & False, box(), None)["false_positive_voxel"] == 40
    assert score_pair(box()[0] & False, box()[1], (2, 3))["false_positive_mm2"] == 120


def test_overlap_by_hand():
    found = score_pair(box(), box(size=(2, 4, 3)), SPACING)
    assert found["dice"] == found["dice_present"] == pytest.approx(2 * 24 / (40 + 24))
    assert found["iou"] == pytest.approx(24 / 40)
    assert found["hd95_mm"] == 1.0


def test_units_are_part_of_the_name():
    assert {"hd95_px", "nsd_2px"} <= set(score_pair(box()[1], box()[1], None))
    assert {"hd95_voxel", "nsd_2voxel"} <= set(score_pair(box(), box(), None))
    with pytest.raises(NotComparable, match="spacing of 2 numbers for a mask of 3 axes"):
        score_pair(box(), box(), (1, 1))


def test_a_single_slice_is_scored_in_its_plane():
    volume = [np.zeros((6, 10, 12), bool) for _ in range(2)]
    flat = box()[1], box(start=(1, 2, 6))[1]
    for one, mask in zip(volume, flat, strict=True):
        one[3] = mask
    found, expected = score_pair(*volume, SPACING), score_pair(*flat, SPACING[1:])
    assert found["hd95_mm"] == expected["hd95_mm"] > 0
    assert found["nsd_1mm"] == expected["nsd_1mm"] < 1
    volume[0][4] = flat[0]
    assert score_pair(*volume, SPACING)["hd95_mm"] >= 5.0  # the distance of two slices


def sample(truths, masks, **more):
    return Sample("seg2d", "0", "?", truth_masks=encode_masks(truths), masks=encode_masks(masks), **more)


def test_no_mask_is_an_empty_one():
    assert score_masks(sample([box()[1]], []))["dice_present"] == 0
    assert score_masks(sample([box()[0]], []))["absent_correct"] == 1


def test_predictions_come_to_the_grid_of_the_truth():
    truth = box()[1]
    twice = truth.repeat(2, 0).repeat(2, 1)
    assert score_masks(sample([truth], [twice]))["dice"] == 1
    assert score_masks(sample([twice], [truth]))["dice"] == 1
    assert score_masks(sample([box()], [box().repeat(3, 1).repeat(3, 2)]))["dice"] == 1
    for other in (truth.repeat(2, 0), np.zeros((3, 20, 24), bool), np.zeros((20, 24, 1), bool)):
        with pytest.raises(NotComparable, match="a mask of .* for a truth of 12x10"):
            score_masks(sample([truth], [other]))


def test_a_target_may_have_its_own_tolerance():
    truth, predicted = box(), box(start=(1, 2, 4))
    found = score_masks(sample([truth], [predicted], category="vessel", spacing=SPACING), {"vessel": 0.25})
    assert found["nsd_own_mm"] < found["nsd_1mm"]
    other = score_masks(sample([truth], [predicted], category="liver", spacing=SPACING), {"vessel": 0.25})
    assert "nsd_own_mm" not in other


def test_several_masks_are_assigned_and_not_taken_greedily():
    grid = np.eye(12, dtype=bool)
    a, b = grid[:6].any(0), grid[6:].any(0)
    both = np.stack([a, b])
    assert assigned_dice([a, b], [b, a]) == 1
    assert assigned_dice([a, b], [a]) == 0.5  # one left over
    assert assigned_dice([a], [a, b, ~both[0] & ~both[1]]) == pytest.approx(1 / 3)
    assert assigned_dice([], []) == 1 and assigned_dice([], [a]) == 0
    # Taking the best pair first (0.8) would leave 0; the other way gives 2/3 and 2/3.
    first, second = np.array([1, 1, 1, 0, 0], bool), np.array([0, 0, 1, 0, 0], bool)
    one, other = np.array([0, 1, 1, 0, 0], bool), np.array([1, 0, 0, 0, 0], bool)
    table = [[2 * (t & p).sum() / (t.sum() + p.sum()) for p in (one, other)] for t in (first, second)]
    assert table == [[pytest.approx(0.8), pytest.approx(0.5)], [pytest.approx(2 / 3), 0]]
    assert assigned_dice([first, second], [one, other]) == pytest.approx((0.5 + 2 / 3) / 2)
    found = score_masks(sample([a[None], b[None]], [b[None], a[None]]))
    assert found["assigned_dice"] == found["dice"] == 1


volumes = st.tuples(*[arrays(bool, (3, 8, 9))] * 2)


@settings(max_examples=40, deadline=None)
@given(volumes, st.sampled_from([SPACING, None]))
def test_what_holds_for_any_masks(pair, spacing):
    truth, predicted = pair
    found, other = score_pair(truth, predicted, spacing), score_pair(predicted, truth, spacing)
    unit = "mm" if spacing else "voxel"
    for name in ("dice", "iou", f"nsd_1{unit}", f"nsd_2{unit}", f"hd95_penalised_{unit}"):
        assert found[name] == pytest.approx(other[name])
    assert found["dice"] == pytest.approx(2 * found["iou"] / (1 + found["iou"]))
    assert 0 <= found[f"nsd_1{unit}"] <= found[f"nsd_2{unit}"] <= found[f"nsd_3{unit}"] <= 1
    assert ("dice_present" in found) == bool(truth.any()) == ("absent_correct" not in found)
    margins = [(1, 2), (3, 0), (2, 2)]
    padded = score_pair(np.pad(truth, margins), np.pad(predicted, margins), spacing)
    for name in set(found) - {f"hd95_penalised_{unit}"}:
        assert padded[name] == pytest.approx(found[name])
    assert score_pair(truth, truth, spacing)["dice"] == 1
