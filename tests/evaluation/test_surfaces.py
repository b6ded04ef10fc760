"""Distances between surfaces: recorded ones, those of the package that defined them, and their symmetries."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unibiomed_jax.evaluation import surfaces
from unibiomed_jax.evaluation.surfaces import bounding_box, measure

SPACINGS = st.sampled_from([0.25, 0.5, 0.78, 1.0, 2.5, 5.0])


def masks(shape):
    """Random voxels, or a few boxes, which are far apart more often."""
    boxes = st.lists(
        st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in shape]),
        min_size=1,
        max_size=3,
    )

    def draw(found):
        mask = np.zeros(shape, bool)
        for box in found:
            mask[tuple(slice(start, start + length) for start, length in box)] = True
        return mask

    return st.one_of(arrays(bool, shape).filter(np.any), boxes.map(draw))


def pairs(most=(9, 24, 30)):
    shapes = st.sampled_from([most, most[1:], (3, *most[1:]), (1, 1, most[2]), (most[1], 1)])
    return shapes.flatmap(lambda s: st.tuples(masks(s), masks(s), st.tuples(*[SPACINGS for _ in s])))


def summary(found):
    return [found.hausdorff(), found.hausdorff(1.0), *(found.dice(tolerance) for tolerance in (0.5, 1, 2, 3))]


def test_recorded_surfaces(golden):
    cases = json.loads((golden / "surfaces/expected.json").read_text())["cases"]
    arrays = np.load(golden / "surfaces/masks.npz")
    assert len(cases) == 13
    measured = 0
    for name, case in cases.items():
        shape = case["shape"]
        truth, predicted = (
            np.unpackbits(arrays[f"{name}_{kind}"], count=np.prod(shape)).reshape(shape).astype(bool)
            for kind in ("truth", "prediction")
        )
        found = measure(truth, predicted, case["spacing"])
        assert [len(found.truth_areas), len(found.predicted_areas)] == case["n_surfels"]
        for areas, area in zip(
            (found.truth_areas, found.predicted_areas), case["surface_area_mm2"], strict=True
        ):
            assert areas.sum() == pytest.approx(area, abs=1e-9)
        if not (truth.any() and predicted.any()):
            continue
        measured += 1
        assert found.hausdorff() == pytest.approx(case["hd95"], abs=1e-12, rel=0)
        assert found.hausdorff(1.0) == pytest.approx(case["hd"], abs=1e-12, rel=0)
        for tolerance, score in case["nsd"].items():
            assert found.dice(float(tolerance)) == pytest.approx(score, abs=1e-12, rel=0)
    assert measured > 8


@pytest.fixture(scope="module")
def oracle():
    """The package, which needs two names that NumPy 2 dropped."""
    package = pytest.importorskip("surface_distance")
    patch = pytest.MonkeyPatch()
    patch.setattr(np, "Inf", np.inf, raising=False)
    yield package
    patch.undo()


def by_distance(distances, areas):
    """Pairs in order, those equal but for rounding by their areas."""
    return np.array(sorted(zip(distances.round(9), areas, strict=True)))


@settings(max_examples=120, deadline=None)
@given(pair=pairs())
def test_the_same_distances_as_the_package(oracle, pair):
    truth, predicted, spacing = pair
    found = measure(truth, predicted, spacing)
    expected = oracle.compute_surface_distances(truth, predicted, spacing)
    for distances, areas, way, side in (
        (found.truth_distances, found.truth_areas, "gt_to_pred", "gt"),
        (found.predicted_distances, found.predicted_areas, "pred_to_gt", "pred"),
    ):
        ours = by_distance(distances, areas)
        theirs = by_distance(expected[f"distances_{way}"], expected[f"surfel_areas_{side}"])
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert found.hausdorff(1.0) == pytest.approx(oracle.compute_robust_hausdorff(expected, 100))


@given(spacing=st.tuples(SPACINGS, SPACINGS, SPACINGS))
@settings(max_examples=10)
def test_areas_of_all_neighbourhoods(oracle, spacing):
    table = oracle.metrics.lookup_tables
    np.testing.assert_allclose(
        surfaces._areas(spacing), table.create_table_neighbour_code_to_surface_area(spacing), rtol=1e-12
    )
    np.testing.assert_allclose(
        surfaces._areas(spacing[:2]),
        table.create_table_neighbour_code_to_contour_length(spacing[:2]),
        rtol=1e-12,
    )


@settings(max_examples=40)
@given(pair=pairs(), data=st.data())
def test_symmetries(pair, data):
    truth, predicted, spacing = pair
    expected = summary(measure(truth, predicted, spacing))

    def check(first, second, sizes):
        assert summary(measure(first, second, sizes)) == pytest.approx(expected, abs=1e-9)

    check(predicted, truth, spacing)
    order = data.draw(st.permutations(range(truth.ndim)))
    check(truth.transpose(order), predicted.transpose(order), [spacing[axis] for axis in order])
    before = data.draw(st.tuples(*[st.integers(0, 5) for _ in spacing]))
    margins = [(n, 7 - n) for n in before]
    check(np.pad(truth, margins), np.pad(predicted, margins), spacing)
    assert summary(measure(truth, predicted, [2 * size for size in spacing]))[:2] == pytest.approx(
        [2 * value for value in expected[:2]]
    )


@given(pair=pairs())
@settings(max_examples=20)
def test_a_mask_fits_itself(pair):
    truth, _, spacing = pair
    found = measure(truth, truth.copy(), spacing)
    assert summary(found) == [0, 0, 1, 1, 1, 1]


def test_a_ball_has_about_its_area():
    side, radius = 48, 20.0
    grid = np.indices((side, side, side)) - (side - 1) / 2
    ball = (grid**2).sum(0) <= radius**2
    areas = measure(ball, ball, (1, 1, 1)).truth_areas
    assert areas.sum() == pytest.approx(4 * np.pi * radius**2, rel=0.1)


def test_far_surfaces_are_found_too():
    truth, predicted = np.zeros((60, 200), bool), np.zeros((60, 200), bool)
    truth[5, 3] = predicted[55, 190] = True
    found = measure(truth, predicted, (2.0, 0.5))
    assert found.hausdorff(1.0) == pytest.approx(np.hypot(2.0 * 50, 0.5 * 187))


@pytest.mark.parametrize("spacing", [(1.0, 5.0, 0.1), (5.0, 0.1, 3.0), (0.1, 0.1, 9.0)])
def test_very_long_voxels(spacing):
    truth, predicted = np.zeros((6, 9, 90), bool), np.zeros((6, 9, 90), bool)
    truth[2, 4, 4] = predicted[2, 4, 70] = predicted[4, 7, 4] = True
    found = measure(truth, predicted, spacing)
    across, along = np.hypot(spacing[0], 2 * spacing[1]), 65 * spacing[2]
    nearest = [
        min(np.hypot(dz * spacing[0], dy * spacing[1]), np.hypot(dx * spacing[2], 0))
        for dz, dy, dx in itertools.product((1, 2), (2, 3), (65, 66))
    ]
    assert found.truth_distances.min() == pytest.approx(min(nearest)) == pytest.approx(min(across, along))
    assert found.truth_distances.max() == pytest.approx(max(nearest))


def test_against_an_empty_mask():
    mask = np.zeros((4, 5, 6), bool)
    mask[1:3, 1:3, 1:3] = True
    found = measure(mask, mask & False, (1, 1, 1))
    assert np.isinf(found.truth_distances).all() and len(found.predicted_areas) == 0
    assert found.dice(2) == 0
    assert len(measure(mask & False, mask & False, (1, 1, 1)).truth_areas) == 0


def test_bounding_box():
    mask = np.zeros((4, 5, 6), bool)
    assert bounding_box(mask) is None
    mask[1, 2:4, 5] = True
    assert bounding_box(mask) == (slice(1, 2), slice(2, 4), slice(5, 6))
