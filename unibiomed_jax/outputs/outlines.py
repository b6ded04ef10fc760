"""Outlines of a mask along the edges of its pixels."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

# From a corner to the next: right, down, left, up, as (rows, columns).
_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines of a (rows, columns) mask, of its regions and of the holes in them.

    Regions that touch at a corner alone get outlines of their own, as do holes; no outline meets itself.

    Returns:
        For each (points, 2) rows and columns of its corners, in pixels (a pixel reaches from -0.5 to 0.5
        about its number), clockwise on the screen around a region, the other way around a hole. The last
        point is joined to the first.
    """
    padded = np.pad(mask.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    # Edges with the region on their right hand, by their first corner: (row, column) -> directions.
    edges: dict[tuple[int, int], set[int]] = defaultdict(set)
    for direction, (outside, (down, right)) in enumerate(
        zip(
            (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2]),
            ((0, 0), (0, 1), (1, 1), (1, 0)),
            strict=True,
        )
    ):
        for row, column in np.argwhere(inside & ~outside).tolist():
            edges[row + down, column + right].add(direction)
    outlines = []
    while edges:
        start = corner = next(iter(edges))
        direction = next(iter(edges[start]))
        points: list[tuple[int, int]] = []
        before = None
        while True:
            if direction != before:
                points.append(corner)
            edges[corner].remove(direction)
            if not edges[corner]:
                del edges[corner]
            before = direction
            corner = corner[0] + _STEPS[direction][0], corner[1] + _STEPS[direction][1]
            if corner == start and (corner not in edges or _turn(edges[corner], direction) is None):
                break
            direction = _turn(edges[corner], direction)
        if before == _direction(points[0], points[1]):  # the walk began in the middle of an edge
            points.pop(0)
        outlines += [np.array(loop, np.float64) - 0.5 for loop in _apart(points)]
    return outlines


def _apart(points: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """A closed walk as loops that pass each of their corners once."""
    loops: list[list[tuple[int, int]]] = []
    walk: list[tuple[int, int]] = []
    passed: dict[tuple[int, int], int] = {}
    for corner in points:
        if corner in passed:
            loops.append(walk[passed[corner] :])
            del walk[passed[corner] :]
            for other in loops[-1]:
                del passed[other]
        passed[corner] = len(walk)
        walk.append(corner)
    return [*loops, walk]


def _turn(directions: set[int], before: int) -> int | None:
    """The next edge: to the right where two regions touch at a corner, so that each keeps to itself."""
    return next((d for d in ((before + 1) % 4, before, (before + 3) % 4) if d in directions), None)


def _direction(start: tuple[int, int], end: tuple[int, int]) -> int:
    step = int(np.sign(end[0] - start[0])), int(np.sign(end[1] - start[1]))
    return _STEPS.index(step)
