"""Regions and boxes to the visual tokens that lie in them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.regions import box_masks, region_cells


def test_regions_equal_the_recorded_prompt():
    y, x = np.mgrid[:410, :410]
    masks = np.zeros((2, 410, 410), np.float32)
    masks[0, 82:184, 123:246] = 1
    masks[1] = (y - 287) ** 2 + (x - 205) ** 2 < 61.5**2
    cells = region_cells(masks, (410, 410), grid=4)
    text = str(np.load(GOLDEN / "micro" / "region_abdomen.npz")["input_text"])
    recorded = [part.split("</vp>")[0].count("<IMG_CONTEXT>") for part in text.split("<vp>")[1:]]
    assert cells.sum((1, 2)).tolist() == recorded


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([4, 8, 16]), st.data())
def test_cells_read_the_pixel_under_the_floor(width, height, grid, data):
    row, column = data.draw(st.integers(0, grid - 1)), data.draw(st.integers(0, grid - 1))
    mask = np.zeros((height, width))
    mask[row * height // grid, column * width // grid] = 1
    cells = region_cells([mask], (width, height), grid)
    for i in range(grid):
        for j in range(grid):
            assert cells[0, i, j] == (mask[int(i * height / grid), int(j * width / grid)] == 1)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([], "empty; give at least one"),
        (
            [np.ones((20, 30)), np.ones((30, 20))],
            r"region2 has the shape \(30, 20\) but the image has 20 rows and 30",
        ),
        ([np.ones((20, 30, 1))], "region1 has the shape"),
        ([np.zeros((20, 30))], "region1 is empty"),
    ],
)
def test_unusable_regions(masks, message):
    with pytest.raises(InputError, match=message):
        region_cells(masks, (30, 20))


def test_region_between_the_points_of_the_grid():
    mask = np.zeros((320, 320), bool)
    mask[1:19, 1:19] = True
    with pytest.raises(InputError, match="region1 holds no point of the 16x16 grid"):
        region_cells([mask], (320, 320))


def test_boxes():
    masks = box_masks([(1, 2, 4, 3), (0.5, 0.5, 1.5, 1.5)], (5, 4))
    assert masks.shape == (2, 4, 5)
    assert np.argwhere(masks[0]).tolist() == [[2, 1], [2, 2], [2, 3]]
    assert np.argwhere(masks[1]).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    "box", [(0, 0, 6, 4), (-1, 0, 2, 2), (2, 2, 2, 3), (3, 0, 1, 2), (0, 0, 1), (0, 0, 1, np.nan)]
)
def test_unusable_boxes(box):
    with pytest.raises(InputError, match="Box 1"):
        box_masks([box], (5, 4))
