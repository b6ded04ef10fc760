"""Images to tiles of bytes, bit for bit the pixels that the reference recorded."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from places import GOLDEN

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.images import open_image
from unibiomed_jax.inputs.tiles import frame_tiles, image_tiles, sam_image, tile_grid
from unibiomed_jax.models.ops import normalize

ABDOMEN = GOLDEN / "images" / "CT_abdomen.png"

# The candidate grids in the order in which the original implementation visits them.
GRIDS = [
    (1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (5, 1), (1, 5), (1, 6), (6, 1),
    (3, 2), (2, 3), (7, 1), (1, 7), (4, 2), (2, 4), (1, 8), (8, 1), (1, 9), (3, 3), (9, 1), (2, 5),
    (5, 2), (10, 1), (1, 10), (11, 1), (1, 11), (12, 1), (3, 4), (4, 3), (1, 12), (6, 2), (2, 6),
]  # fmt: skip


def golden(name: str, key: str) -> np.ndarray:
    return np.load(GOLDEN / "micro" / f"{name}.npz")[key]


def as_recorded(pixels: np.ndarray) -> np.ndarray:
    """What the model makes of bytes, with the channels first as the recordings have them."""
    assert pixels.dtype == np.uint8
    values = np.asarray(jax.jit(normalize)(pixels))
    assert values.dtype == np.float32
    return np.moveaxis(values, -1, -3)


def golden_frames() -> list[Image.Image]:
    image = open_image(ABDOMEN)[0].resize((410, 410))
    return [image.crop((10 * i, 12 * i, 10 * i + 320, 12 * i + 240)) for i in range(8)]


# --- against the recorded pixels, bit for bit ---


@pytest.mark.parametrize("case", ["image_abdomen", "region_abdomen"])
def test_image_equals_recorded_pixels(case):
    image, record = open_image(ABDOMEN)
    read = (record.format, record.mode, record.width, record.height, record.steps)
    assert read == ("PNG", "RGB", 410, 410, ())
    tiles, grid = image_tiles(image, tile_size=112)
    assert grid == (3, 3)
    np.testing.assert_array_equal(as_recorded(tiles), golden(case, "pixel_values"))
    np.testing.assert_array_equal(as_recorded(sam_image(image, 256)), golden(case, "g_pixel_values0")[0])


def test_wide_image_equals_recorded_pixels():
    image, _ = open_image(ABDOMEN)
    tiles, grid = image_tiles(image.crop((0, 0, 410, 200)), tile_size=112)
    assert grid == (4, 2)
    np.testing.assert_array_equal(as_recorded(tiles), golden("image_noseg", "pixel_values"))


def test_frames_equal_recorded_pixels():
    frames = golden_frames()
    tiles = frame_tiles(frames[:5], tile_size=112)
    np.testing.assert_array_equal(as_recorded(tiles), golden("video8", "pixel_values"))
    np.testing.assert_array_equal(
        as_recorded(sam_image(frames[0], 256)), golden("video8", "g_pixel_values0")[0]
    )


def test_frames_must_be_there_and_of_one_size():
    with pytest.raises(InputError, match="empty; give at least one frame"):
        frame_tiles([])
    with pytest.raises(InputError, match="Frame 1 is 5x4 pixels but frame 0 is 4x4"):
        frame_tiles([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])


# --- tiling ---


@pytest.mark.parametrize(
    ("size", "grid", "tiles"),
    [
        ((256, 256), (1, 1), 1),
        ((512, 512), (1, 1), 1),
        ((633, 633), (1, 1), 1),
        ((634, 634), (2, 2), 5),
        ((640, 640), (2, 2), 5),
        ((800, 800), (2, 2), 5),
        ((950, 950), (2, 2), 5),
        ((951, 951), (3, 3), 10),
        ((1024, 1024), (3, 3), 10),
        ((1024, 512), (2, 1), 3),
        ((600, 800), (3, 4), 13),
        ((800, 600), (4, 3), 13),
        ((640, 480), (4, 3), 13),
        ((1280, 720), (4, 2), 9),
        ((300, 900), (1, 3), 4),
        ((50, 500), (1, 10), 11),
    ],
)
def test_known_grids(size, grid, tiles):
    assert tile_grid(*size) == grid
    cut, cut_grid = image_tiles(Image.new("RGB", size), tile_size=448)
    assert (len(cut), cut_grid) == (tiles, grid)


sides = st.integers(1, 5000)


@given(sides, sides)
@settings(max_examples=500)
def test_grid_equals_the_loop_over_the_original_order(width, height):
    best, best_difference = None, float("inf")
    for columns, rows in GRIDS:
        difference = abs(width / height - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * 448 * 448 * columns * rows:
            best = (columns, rows)
    assert tile_grid(width, height) == best


@given(sides, sides, st.integers(1, 6), st.integers(0, 10), st.sampled_from([14, 112, 448]))
def test_grid_is_within_limits_and_closest(width, height, min_tiles, more, tile_size):
    max_tiles = min_tiles + more
    limits = {"min_tiles": min_tiles, "max_tiles": max_tiles, "tile_size": tile_size}
    columns, rows = tile_grid(width, height, **limits)
    assert min_tiles <= columns * rows <= max_tiles
    every = [(c, r) for c in range(1, 17) for r in range(1, 17) if min_tiles <= c * r <= max_tiles]
    difference = abs(width / height - columns / rows)
    assert difference == min(abs(width / height - c / r) for c, r in every)
    # Among grids that are as close, the largest that the image's pixels justify.
    justified = [
        c * r
        for c, r in every
        if abs(width / height - c / r) == difference and width * height > 0.5 * tile_size**2 * c * r
    ]
    if justified:
        assert columns * rows == max(justified)
    assert tile_grid(width, height, **limits) == (columns, rows)


def test_grid_limits_are_checked():
    with pytest.raises(InputError, match="min_tiles=3, max_tiles=2"):
        tile_grid(10, 10, min_tiles=3, max_tiles=2)


def test_tiles_are_row_major_with_the_thumbnail_last():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[..., 0] = [[10, 20, 30], [40, 50, 60]]
    image = Image.fromarray(pixels.repeat(40, 0).repeat(40, 1))
    tiles, grid = image_tiles(image, tile_size=16)
    assert len(tiles) == 7 and grid == (3, 2)
    assert tiles[:6, 8, 8, 0].tolist() == [10, 20, 30, 40, 50, 60]
    np.testing.assert_array_equal(tiles[6], image.resize((16, 16), Image.Resampling.BICUBIC))
    assert len(image_tiles(image, tile_size=16, use_thumbnail=False)[0]) == 6
    assert len(image_tiles(image, tile_size=16, max_tiles=1)[0]) == 1
