"""How large a mask of a study is: volume, longest diameter, slices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from unibiomed_jax.studies.study import Geometry, Study


@dataclass(frozen=True)
class Measures:
    """The size of one mask."""

    pixels: int
    # None where pixels have no known size, or slices lie at uneven distances.
    volume_ml: float | None
    # The longest straight line between edges of pixels of one connected region of one slice, as one would
    # measure it on the screen, mm; None where pixels have no known size or the mask is empty.
    diameter_mm: float | None
    # The slice of that line, from 1.
    diameter_slice: int | None
    # The first and the last slice with a pixel, from 1; None: the mask is empty.
    slices: tuple[int, int] | None


def measure(study: Study, mask: Bool[np.ndarray, "slices rows columns"]) -> Measures:
    """The measures of a mask on the grid of `study.values`."""
    geometry = study.geometry
    pixels = int(np.count_nonzero(mask))
    found = np.flatnonzero(mask.any((1, 2))).tolist()
    volume, lengths = None, {}
    if geometry is not None:
        if not len(geometry.uneven):
            volume = round(pixels * float(np.prod(geometry.spacing)) / 1000, 6)
        lengths = {index: diameter(mask[index], geometry) for index in found}
    longest = max(lengths, key=lengths.__getitem__, default=None)
    return Measures(
        pixels=pixels,
        volume_ml=volume,
        diameter_mm=None if longest is None else round(lengths[longest], 3),
        diameter_slice=None if longest is None else longest + 1,
        slices=(found[0] + 1, found[-1] + 1) if found else None,
    )


def diameter(mask: Bool[np.ndarray, "rows columns"], geometry: Geometry) -> float:
    """The longest line inside the outline of one connected region of a slice that is not empty, mm."""
    regions, count = ndimage.label(mask, np.ones((3, 3)))
    longest = 0.0
    for number, box in enumerate(ndimage.find_objects(regions, count), 1):
        region = regions[box] == number
        rows = np.arange(region.shape[0])
        first, last = region.argmax(1), region.shape[1] - 1 - region[:, ::-1].argmax(1)
        # The outer corners of the ends of each row; the hull of the region is that of these.
        corners = [
            np.stack([rows + row, ends + column], 1)
            for row in (-0.5, 0.5)
            for ends, column in ((first, -0.5), (last, 0.5))
        ]
        corners = np.concatenate(corners)[np.tile(region.any(1), 4)]
        points = corners[:, :1] * geometry.down + corners[:, 1:] * geometry.across
        points = points[ConvexHull(corners).vertices]  # the same corners in pixels and in mm
        longest = max(longest, float(cdist(points, points).max()))
    return longest
