"""Images to the squares of bytes that the two image encoders read.

The language model's vision tower sees square tiles, SAM2 sees the whole image stretched to a square. Every
resize is Pillow's bicubic filter (8-bit, antialiased when shrinking), because the weights were trained on
exactly that. The model normalises.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.images import check_frames


def tile_grid(
    width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448
) -> tuple[int, int]:
    """Columns and rows of the tile grid whose shape is closest to the image's (InternVL's dynamic tiling).

    Of all grids of min_tiles to max_tiles tiles, in order of their number, the one with the smallest
    |width/height - columns/rows|. A later grid of the same shape replaces the best so far only if the image
    has more than half of that grid's pixels, so that small images are not magnified for nothing.

    Raises:
        InputError: limits that allow no grid.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise InputError(f"min_tiles={min_tiles}, max_tiles={max_tiles} allow no grid; use 1 <= min <= max.")
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        enough_pixels = width * height > 0.5 * tile_size**2 * columns * rows
        if difference < best_difference or (difference == best_difference and enough_pixels):
            best, best_difference = (columns, rows), difference
    return best


def image_tiles(
    image: Image.Image,
    *,
    tile_size: int = 448,
    min_tiles: int = 1,
    max_tiles: int = 12,
    use_thumbnail: bool = True,
) -> tuple[UInt8[np.ndarray, "tiles tile_size tile_size 3"], tuple[int, int]]:
    """What the vision tower sees of one RGB image: tiles row by row, then the whole as a thumbnail.

    There is no thumbnail when the grid is a single tile, which already is the whole image.

    Returns:
        The tiles, and the grid's (columns, rows).
    """
    columns, rows = tile_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size)
    pixels = _stretch(image, columns * tile_size, rows * tile_size)
    tiles = (
        pixels.reshape(rows, tile_size, columns, tile_size, 3)
        .swapaxes(1, 2)
        .reshape(-1, tile_size, tile_size, 3)
    )
    if use_thumbnail and len(tiles) > 1:
        tiles = np.concatenate([tiles, _stretch(image, tile_size, tile_size)[None]])
    return tiles, (columns, rows)


def frame_tiles(
    frames: Sequence[Image.Image], *, tile_size: int = 448
) -> UInt8[np.ndarray, "frames tile_size tile_size 3"]:
    """What the vision tower sees of a frame sequence: one stretched tile a frame, no tiling.

    Raises:
        InputError: no frames, or frames of different sizes.
    """
    check_frames(frames)
    return np.stack([_stretch(frame, tile_size, tile_size) for frame in frames])


def sam_image(image: Image.Image, size: int = 1024) -> UInt8[np.ndarray, "size size 3"]:
    """What SAM2 sees: the RGB image stretched to a square (aspect ratio not kept)."""
    return _stretch(image, size, size)


def _stretch(image: Image.Image, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
