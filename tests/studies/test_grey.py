"""Grey levels and views as the checkpoints saw them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from unibiomed_jax.config.preprocessing import PREPROCESSING
from unibiomed_jax.errors import InputError
from unibiomed_jax.studies.grey import choose_window, to_grey
from unibiomed_jax.studies.study import Geometry, Study
from unibiomed_jax.studies.views import find_view
from unibiomed_jax.studies.windows import Window, own_window

RELEASED, TINY = PREPROCESSING["released"], PREPROCESSING["tiny"]
LEFT, BACK, HEAD = np.eye(3)


def made(values, modality="CT", across=LEFT, down=BACK, **more) -> Study:
    values = np.asarray(values, np.float32)
    origins = np.arange(len(values))[:, None] * np.cross(across, down)
    geometry = Geometry(origins, across, down)
    return Study(values, modality, "HU" if modality == "CT" else "", geometry, "study-a", "series-a", **more)


def test_ct_without_a_window_is_refused_with_the_list():
    study = made(np.zeros((1, 2, 2)))
    with pytest.raises(
        InputError, match="'abdomen', 'lung', 'pelvis', 'liver', 'colon', 'pancreas', 'percentile'"
    ):
        choose_window(study, RELEASED)
    with pytest.raises(InputError, match="'pancreas', 'own', 'percentile'"):
        choose_window(replace(study, own_windows=(Window(0, 1, "the file's own"),)), RELEASED)
    window = choose_window(replace(study, body_part="Chest"), RELEASED)
    assert (window.low, window.high) == (-1000, 1000)
    window = choose_window(study, TINY)
    assert (window.low, window.high) == (-160, 240)
    window = choose_window(study, RELEASED, "colon")
    assert (window.low, window.high) == (-68, 187)
    assert choose_window(study, RELEASED, (-5.0, 7.0)).origin == "stated"
    for asked, words in (((3.0, 3.0), "impossible"), ("own", "no window of its own"), ("brain", "no window")):
        with pytest.raises(InputError, match=words):
            choose_window(study, RELEASED, asked)


def test_a_volume_of_unknown_kind_is_not_stretched_without_being_told():
    study = made(np.arange(8).reshape(2, 2, 2), modality="unknown")
    with pytest.raises(InputError, match="does not say whether it is a CT"):
        choose_window(study, TINY)
    assert choose_window(study, TINY, "percentile").low == pytest.approx(0.035)
    with pytest.raises(InputError, match="is one of CT"):
        choose_window(replace(study, modality="MR"), RELEASED, "liver")


def test_percentiles_leave_out_what_each_checkpoint_left_out():
    values = np.concatenate([np.zeros(1000), np.linspace(1, 1000, 1000)]).reshape(2, 10, 100)
    study = made(values, modality="MR")
    assert choose_window(study, RELEASED).low == pytest.approx(np.percentile(values[values > 0], 0.5))
    assert choose_window(study, TINY).low == 0
    padding = values > 900
    assert choose_window(replace(study, padding=padding), TINY).high < 900


def test_grey_levels_of_the_window_padding_and_inverted_films():
    study = made([[[-2000.0, -150.0, 50.0, 250.0, 3000.0, 99.0]]], padding=np.array([[[0] * 5 + [1]]], bool))
    window = choose_window(study, RELEASED, "abdomen")
    assert to_grey(study, window, truncate=True, index=0).tolist() == [[0, 0, 127, 255, 255, 0]]
    assert to_grey(study, window, truncate=False, index=0).tolist() == [[0, 0, 128, 255, 255, 0]]
    inverted = replace(study, white_is_low=True)
    assert to_grey(inverted, window, truncate=False, index=0).tolist() == [[255, 255, 128, 0, 0, 255]]


def test_windows_of_files_are_dicoms_equations():
    # C.11.2.1.2.1: for centre 2048 and width 4096, 0 is black and 4095 white.
    linear = own_window(2048, 4096, "LINEAR")
    assert (linear.low, linear.high) == (0, 4095)
    exact = own_window(2048, 4096, "LINEAR_EXACT")
    assert (exact.low, exact.high) == (0, 4096)
    sigmoid = own_window(50, 400, "SIGMOID").shares(np.array([50, 150], np.float32))
    np.testing.assert_allclose(sigmoid, [0.5, 1 / (1 + np.exp(-1))], rtol=1e-6)
    assert own_window(50, 0.5, "LINEAR") is None and own_window(50, 0, "SIGMOID") is None


def test_a_view_shows_the_patient_as_the_checkpoint_saw_it():
    """A body whose values say how far left, back and up they are, stored in all 48 ways."""
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            body = [sign * np.eye(3)[axis] for axis, sign in zip(axes, signs, strict=True)]
            step, down, across = body
            if np.cross(across, down) @ step < 0:
                step = -step
            places = (
                np.arange(2)[:, None, None, None] * step
                + np.arange(4)[:, None, None] * down
                + np.arange(7)[:, None] * across
            )
            for direction, modality, preprocessing, wanted in (
                ("radiological", "CT", TINY, {2: (BACK, LEFT), 1: (-HEAD, LEFT), 0: (-HEAD, BACK)}),
                ("voxel order", "CT", RELEASED, {2: (-LEFT, -BACK), 1: (-LEFT, HEAD), 0: (-BACK, HEAD)}),
                ("radiological", "MR", RELEASED, {2: (BACK, LEFT), 1: (-HEAD, LEFT), 0: (-HEAD, BACK)}),
            ):
                study = made(places[..., 0], modality, across, down)
                view = find_view(study, preprocessing)
                shown = view.show(places[1])
                rows, columns = wanted[np.abs(step).argmax()]
                middle = (shown.shape[0] // 2, shown.shape[1] // 2)  # within the borders
                at = shown[middle]
                np.testing.assert_array_equal(shown[middle[0] + 1, middle[1]] - at, rows, direction)
                np.testing.assert_array_equal(shown[middle[0], middle[1] + 1] - at, columns, direction)
                mask = np.random.default_rng(0).random((4, 7)) < 0.5
                np.testing.assert_array_equal(view.restore(view.show(mask)), mask)


def test_released_views_are_square_but_for_an_odd_pixel():
    study = made(np.ones((1, 4, 8)), modality="MR")
    shown = find_view(study, RELEASED).show(study.values[0])
    assert shown.shape == (8, 8) and shown[:2].max() == 0 and shown[2:6].min() == 1 and shown[6:].max() == 0
    odd = made(np.ones((1, 4, 7)), modality="MR")
    assert find_view(odd, RELEASED).show(odd.values[0]).shape == (6, 7)
    assert find_view(odd, TINY).show(odd.values[0]).shape == (4, 7)
