"""Distances between the surfaces of two masks, each weighted with the area of the surface there.

Between the centres of 2x2x2 neighbouring voxels (2x2 pixels) lies a piece of the surface if they are not all
inside or all outside. Its area is that of marching cubes for the voxels' spacing, its distance that to the
next such place of the other mask. These are the definitions of Nikolov et al. 2021 (doi:10.2196/26151), whose
package `surface-distance` is what the tests compare with.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from scipy.spatial import cKDTree

# In 3D, columns of voxels (along the first axis) around a piece of surface in which the other one is looked
# for, the nearest first. What is not found in these is looked up in a tree, and so is everything in 2D, where
# there are few pieces.
_COLUMNS = 128
# Rounding may not decide whether a distance is within a tolerance, or a share of the area reached.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Surfaces:
    """All pieces of two surfaces: distance to the other surface, and area (length in 2D), in units of the
    spacing. Distances are infinite where the other mask is empty.
    """

    truth_distances: Float[np.ndarray, "truth"]
    truth_areas: Float[np.ndarray, "truth"]
    predicted_distances: Float[np.ndarray, "predicted"]
    predicted_areas: Float[np.ndarray, "predicted"]

    def hausdorff(self, share: float = 0.95) -> float:
        """The smallest distance within which `share` of the area lies, of both surfaces the larger one.

        Both masks hold something.
        """
        return max(
            _reach(self.truth_distances, self.truth_areas, share),
            _reach(self.predicted_distances, self.predicted_areas, share),
        )

    def dice(self, tolerance: float) -> float:
        """Normalised surface Dice: the share of both areas within `tolerance` of the other surface.

        At least one mask holds something.
        """
        within = sum(
            float(areas[distances <= tolerance * (1 + _ROUNDING)].sum())
            for distances, areas in (
                (self.truth_distances, self.truth_areas),
                (self.predicted_distances, self.predicted_areas),
            )
        )
        return within / float(self.truth_areas.sum() + self.predicted_areas.sum())


def _reach(distances: np.ndarray, areas: np.ndarray, share: float) -> float:
    order = distances.argsort()
    area = areas[order].cumsum()
    place = int(area.searchsorted(share * area[-1] * (1 - _ROUNDING)))
    return float(distances[order[min(place, len(order) - 1)]])


def bounding_box(mask: Bool[np.ndarray, "*axes"]) -> tuple[slice, ...] | None:
    """The smallest box that holds the mask; None if it is empty."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        part = mask[tuple(box)]
        found = np.flatnonzero(part.any(tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(found):
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def join_boxes(*boxes: tuple[slice, ...]) -> tuple[slice, ...]:
    """The smallest box around several."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def measure(
    truth: Bool[np.ndarray, "*axes"], predicted: Bool[np.ndarray, "*axes"], spacing: Sequence[float]
) -> Surfaces:
    """Both surfaces of a pair of masks in 2D or 3D.

    Args:
        truth: a mask.
        predicted: another of the same shape.
        spacing: of the voxels, per axis.
    """
    boxes = [box for box in map(bounding_box, (truth, predicted)) if box is not None]
    if not boxes:
        return Surfaces(*[np.zeros(0)] * 4)
    box = join_boxes(*boxes)
    spacing = tuple(map(float, spacing))
    first, second = (_pieces(mask[box], spacing) for mask in (truth, predicted))
    return Surfaces(
        _distances(first, second, spacing), first.areas, _distances(second, first, spacing), second.areas
    )


@dataclass(frozen=True)
class _Pieces:
    """The pieces of one surface: where in the flattened box they are, their areas, and the box's shape."""

    places: Int[np.ndarray, "pieces"]
    areas: Float[np.ndarray, "pieces"]
    is_piece: Bool[np.ndarray, "*axes"]


def _pieces(mask: np.ndarray, spacing: tuple[float, ...]) -> _Pieces:
    reach = _columns_around(spacing[1:])[1] if mask.ndim == 3 else (0,)
    room = [1, *(steps + 1 for steps in reach)]
    padded = np.zeros([n + 2 * more for n, more in zip(mask.shape, room, strict=True)], np.uint8)
    padded[tuple(slice(more, more + n) for n, more in zip(mask.shape, room, strict=True))] = mask
    codes = padded
    for step in range(mask.ndim):  # the last axis first: neighbours become neighbouring bits
        axis = mask.ndim - 1 - step
        before, after = [slice(None)] * mask.ndim, [slice(None)] * mask.ndim
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        joined = codes[tuple(before)] << np.uint8(2**step)
        joined |= codes[tuple(after)]
        codes = joined
    areas = _areas(spacing)
    is_piece = (codes != 0) & (codes != len(areas) - 1)
    places = np.flatnonzero(is_piece)
    return _Pieces(places, areas[codes.reshape(-1)[places]], is_piece)


def _distances(pieces: _Pieces, others: _Pieces, spacing: tuple[float, ...]) -> Float[np.ndarray, "pieces"]:
    """The distance of each of `pieces` to the nearest of `others`."""
    best = np.full(len(pieces.places), np.inf)
    if not len(best) or not len(others.places):
        return best
    beyond = _search_columns(best, pieces, others, spacing) if len(spacing) == 3 else -1.0
    far = np.flatnonzero(best > beyond)
    if len(far):
        best[far] = _squares_by_tree(pieces.places[far], others.places, pieces.is_piece.shape, spacing)
    return np.sqrt(best)


def _search_columns(best: np.ndarray, pieces: _Pieces, others: _Pieces, spacing: tuple[float, ...]) -> float:
    """Put into `best` the squared distances to what the columns around hold.

    Returns:
        The square up to which they are right.
    """
    columns, _ = _columns_around(spacing[1:])
    height, _, width = pieces.is_piece.shape
    in_column = _along_columns(others.is_piece).reshape(-1)
    squares = (np.arange(height) * spacing[0]) ** 2
    squares = np.append(squares, np.inf)  # what `_along_columns` says of a column without any
    open_, places, found = np.arange(len(best)), pieces.places, best
    for (rows, steps), square in columns:
        left = found > square
        if not left.all():  # what no further column can better is done
            best[open_] = found
            open_, places, found = open_[left], places[left], found[left]
            if not len(open_):
                break
        found = np.minimum(found, squares[in_column[places + (rows * width + steps)]] + square)
    best[open_] = found
    return columns[-1][1]


def _along_columns(
    is_piece: Bool[np.ndarray, "slices rows columns"],
) -> Int[np.ndarray, "slices rows columns"]:
    """Steps along the first axis to the nearest piece; the length of the column where it has none."""
    length = len(is_piece)
    number = np.int16 if length < 2**15 else np.int32
    steps = np.where(is_piece, number(0), number(length))
    one_more = np.empty_like(steps[0])
    for order in (range(1, length), range(length - 2, -1, -1)):
        for place in order:
            np.add(steps[place - order.step], 1, out=one_more)
            np.minimum(steps[place], one_more, out=steps[place])
    return steps


def _squares_by_tree(
    places: np.ndarray, others: np.ndarray, shape: tuple[int, ...], spacing: Sequence[float]
) -> Float[np.ndarray, "places"]:
    points, targets = (np.stack(np.unravel_index(flat, shape), -1) for flat in (places, others))
    tree = cKDTree(targets * np.asarray(spacing, float), compact_nodes=False, balanced_tree=False)
    _, nearest = tree.query(points * np.asarray(spacing, float))
    steps = (points - targets[nearest]) * np.asarray(spacing, float)
    return (steps**2).sum(-1)


@functools.lru_cache(maxsize=256)
def _columns_around(
    spacing: tuple[float, float],
) -> tuple[list[tuple[tuple[int, int], float]], tuple[int, int]]:
    """The nearest columns around one: steps to them in a slice, and the squared distance.

    And the largest step along both axes.
    """
    side = 2 * int(_COLUMNS**0.5)
    columns = [
        (steps, sum((n * size) ** 2 for n, size in zip(steps, spacing, strict=True)))
        for steps in itertools.product(range(-side, side + 1), repeat=2)
    ]
    columns.sort(key=lambda column: column[1])
    # Those left out, here or outside of `side`, are at least as far as the limit.
    limit = min(columns[_COLUMNS][1], ((side + 1) * min(spacing)) ** 2)
    taken = [column for column in columns if column[1] < limit]
    return taken, tuple(max(steps[axis] for steps, _ in taken) for axis in range(2))


@functools.lru_cache(maxsize=256)
def _areas(spacing: tuple[float, ...]) -> Float[np.ndarray, "codes"]:
    """The area (length in 2D) of the surface among 2x2x2 voxels (2x2 pixels), by which of them are inside.

    The first voxel is the highest bit of a code, the last axis is the fastest. If more than half are inside,
    the surface is that of those outside. Voxels that share no face have surfaces of their own.
    """
    cells = 2 ** len(spacing)
    areas = np.zeros(2**cells)
    for code in range(1, 2**cells - 1):
        fewer = code if code.bit_count() <= cells // 2 else 2**cells - 1 - code
        corner = np.array([fewer >> bit & 1 for bit in reversed(range(cells))]).reshape([2] * len(spacing))
        labels, count = ndimage.label(corner)
        areas[code] = sum(_area_of_group(labels == number + 1, spacing) for number in range(count))
    return areas


def _area_of_group(group: Bool[np.ndarray, "*axes"], spacing: tuple[float, ...]) -> float:
    """The area around at most half the voxels, which share faces.

    The surface cuts the edges between inside and outside in the middle: around one voxel that is a triangle
    over an eighth of each face, around two the rectangle below both, and so on.
    """
    pairs = [group & np.flip(group, axis) for axis in range(group.ndim)]
    touching = np.array([pair.sum() for pair in pairs])  # twice as many as there are
    if group.ndim == 2:
        return float(np.hypot(*spacing)) / 2 if group.sum() == 1 else spacing[touching.argmax()]
    faces = np.prod(spacing) / np.array(spacing)
    corner = np.linalg.norm(faces) / 8
    count, neighbours = group.sum(), sum(pair.astype(int) for pair in pairs)
    if count == 1:
        return corner
    if count == 2:
        return _sloping(faces, touching.argmax())
    if count == 3:
        return 3 * corner + faces[touching.argmin()] / 2
    if touching.max() == 4:  # all in one plane
        return faces[touching.argmin()]
    if neighbours.max() == 3:  # one voxel and its three neighbours
        return 6 * corner
    ends = [axis for axis, pair in enumerate(pairs) if neighbours[pair].min() == 1]  # a winding row of four
    return 4 * corner + sum(_sloping(faces, axis) for axis in ends) / 2


def _sloping(faces: np.ndarray, axis: int) -> float:
    """The rectangle over half of both faces beside `axis`, and parallel to it."""
    return np.linalg.norm(np.delete(faces, axis)) / 2
