"""Regions that a prompt points at."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.masks import open_mask
from unibiomed_jax.inputs.pixels import ImageSource, show_size


def region_cells(
    masks: Sequence[ImageSource | Sequence], image_size: tuple[int, int], grid: int = 16
) -> Bool[np.ndarray, "regions grid grid"]:
    """Which of the grid x grid visual tokens of the last tile belong to each region.

    Nearest resize as torch's interpolate(mode="nearest"): cell i reads pixel floor(i * length / grid).

    Args:
        masks: one (height, width) mask per region (see `open_mask`), in the frame of the opened image.
        image_size: (width, height) of the opened image.
        grid: tokens along a side of a tile, tile_size / patch_size / 2: 16 in every released model.

    Raises:
        InputError: no masks, what `open_mask` refuses, a mask of another size than the image, an empty mask,
            or one without a token.
    """
    width, height = image_size
    if not len(masks):
        raise InputError("The list of regions is empty; give at least one mask or box, or none at all.")
    rows, columns = (np.arange(grid) * length // grid for length in (height, width))
    cells = []
    for number, mask in enumerate(masks, 1):
        try:
            mask = np.asarray(mask) if isinstance(mask, list | tuple) else mask
            inside = mask if isinstance(mask, np.ndarray) and mask.ndim != 2 else open_mask(mask)
        except ValueError as error:  # InputError, or NumPy's about rows of several lengths
            raise InputError(f"The mask of region{number} cannot be used: {error}") from error
        if inside.shape != (height, width):
            raise InputError(
                f"The mask of region{number} has the shape {inside.shape} but the image has {height} rows "
                f"and {width} columns; resize the mask to the image."
            )
        if not inside.any():
            raise InputError(f"The mask of region{number} is empty; mark at least the pixels of one region.")
        cell = inside[np.ix_(rows, columns)]
        if not cell.any():
            raise InputError(
                f"The mask of region{number} holds no point of the {grid}x{grid} grid on which the model "
                "sees regions; enlarge the mask or crop the image around it."
            )
        cells.append(cell)
    return np.stack(cells)


def box_masks(
    boxes: Sequence[Sequence[float]], image_size: tuple[int, int]
) -> Bool[np.ndarray, "regions height width"]:
    """Filled rectangles (x0, y0, x1, y1) in pixels, right and lower edge exclusive, as region masks.

    Fractions are widened to whole pixels.

    Raises:
        InputError: a box without four finite numbers, without area, or outside the image.
    """
    width, height = image_size
    masks = np.zeros((len(boxes), height, width), bool)
    for number, box in enumerate(boxes, 1):
        try:
            corners = np.asarray(box, np.float64)
        except (TypeError, ValueError):  # words, or lists of several lengths
            corners = np.empty(0)
        if corners.shape != (4,) or not np.isfinite(corners).all():
            raise InputError(f"Box {number} is {box}; give four numbers x0, y0, x1, y1 in pixels.")
        x0, y0, x1, y1 = corners
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InputError(
                f"Box {number} is ({x0:g}, {y0:g}, {x1:g}, {y1:g}) in an image of {show_size(image_size)}; "
                f"it needs 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}."
            )
        masks[number - 1, int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    return masks
