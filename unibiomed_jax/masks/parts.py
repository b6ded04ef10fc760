"""The connected parts of a mask."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from scipy import ndimage


def keep_parts(
    mask: Bool[np.ndarray, "*axes"], *, largest: int | None = None, smallest: float = 0
) -> tuple[Bool[np.ndarray, "*axes"], int]:
    """A mask without some of its parts, which touch at faces, edges or corners.

    Args:
        mask: of any number of axes.
        largest: how many parts to keep, the largest first; None: all.
        smallest: pixels that a part must have.

    Returns:
        The mask, and how many parts were left out.
    """
    if not mask.any():
        return mask, 0
    # Only where there is something: labels take four times the memory of a mask.
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    parts, count = ndimage.label(mask[box], np.ones((3,) * mask.ndim))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")[:largest]
    wanted = order[sizes[order] >= smallest]
    if len(wanted) == count:
        return mask, 0
    kept = np.zeros(mask.shape, bool)
    kept[box] = np.isin(parts, wanted + 1)
    return kept, count - len(wanted)
