"""A slice as the network sees it, turned and made square, and a mask of that view back on stored pixels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from unibiomed_jax.config.preprocessing import Preprocessing, SliceOrientation
from unibiomed_jax.studies.study import NO_SIDES, Geometry, Study

_LEFT, _BACK, _HEAD = np.eye(3)
# Where rows (down) and columns (to the right) of a view run, for slices across the left, back and head.
_VIEWS: dict[SliceOrientation, tuple[tuple[np.ndarray, np.ndarray], ...]] = {
    "radiological": ((-_HEAD, _BACK), (-_HEAD, _LEFT), (_BACK, _LEFT)),
    "ras_voxel": ((-_BACK, _HEAD), (-_LEFT, _HEAD), (-_LEFT, -_BACK)),
}


@dataclass(frozen=True)
class View:
    """How stored rows and columns become those of a view."""

    # Size of the stored slice.
    rows: int
    columns: int
    transposed: bool = False
    # Of the view, after transposing.
    flipped_rows: bool = False
    flipped_columns: bool = False
    square: bool = False

    def show(self, pixels: np.ndarray) -> np.ndarray:
        """A stored slice (rows, columns, ...) as the network sees it."""
        pixels = np.swapaxes(pixels, 0, 1) if self.transposed else pixels
        pixels = pixels[:: -1 if self.flipped_rows else 1, :: -1 if self.flipped_columns else 1]
        (top, bottom), (left, right) = self._borders()
        return np.pad(pixels, ((top, bottom), (left, right)) + ((0, 0),) * (pixels.ndim - 2))

    def restore(self, mask: np.ndarray) -> np.ndarray:
        """What lies on the view, such as a mask, on the stored slice."""
        (top, bottom), (left, right) = self._borders()
        mask = mask[top : mask.shape[0] - bottom, left : mask.shape[1] - right]
        mask = mask[:: -1 if self.flipped_rows else 1, :: -1 if self.flipped_columns else 1]
        return np.swapaxes(mask, 0, 1) if self.transposed else mask

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the view."""
        height, width = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        (top, bottom), (left, right) = self._borders()
        return height + top + bottom, width + left + right

    def _borders(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Black above, below, left and right. Equal on both sides, so that a view of odd difference stays a
        pixel off a square, as the training data were."""
        height, width = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        if not self.square:
            return (0, 0), (0, 0)
        border = abs(height - width) // 2
        return ((border, border), (0, 0)) if height < width else ((0, 0), (border, border))


def find_view(study: Study, preprocessing: Preprocessing) -> View:
    """How a checkpoint saw the slices of such a study. Without geometry they stand as stored."""
    rows, columns = study.values.shape[1:3]
    turns = (False, False, False)
    if study.geometry is not None:
        orientation = preprocessing.ct_orientation if study.modality == "CT" else "radiological"
        turns = _turns(study.geometry, orientation)
    return View(rows, columns, *turns, square=preprocessing.pad_to_square)


def upright(study: Study) -> View:
    """How slices are looked at: the patient's left and back to the right, the head up. As stored without
    geometry."""
    turns = (False, False, False) if study.geometry is None else _turns(study.geometry, "radiological")
    return View(*study.values.shape[1:3], *turns)


def edges(study: Study, view: View) -> tuple[str, str, str, str] | None:
    """What of the patient lies beyond the top, right, bottom and left of a view, in DICOM's letters; None if
    that is not known."""
    geometry = study.geometry
    if geometry is None or NO_SIDES in study.notes:
        return None
    down, right = (geometry.across, geometry.down) if view.transposed else (geometry.down, geometry.across)
    down, right = down * (-1) ** view.flipped_rows, right * (-1) ** view.flipped_columns
    return toward(-down), toward(right), toward(down), toward(-right)


def toward(direction: np.ndarray) -> str:
    """The side of the patient that a direction points to most, in DICOM's letters."""
    axis = np.abs(direction).argmax()
    return ("RL", "AP", "FH")[axis][int(direction[axis] > 0)]


def _turns(geometry: Geometry, orientation: SliceOrientation) -> tuple[bool, bool, bool]:
    """Of the eight ways to turn and mirror a slice the one nearest to the wanted directions."""
    down, right = _VIEWS[orientation][np.abs(geometry.normal).argmax()]
    stored_down, stored_right = (v / np.linalg.norm(v) for v in (geometry.down, geometry.across))

    def nearness(turns: tuple[bool, bool, bool]) -> float:
        transposed, flipped_rows, flipped_columns = turns
        rows, columns = (stored_right, stored_down) if transposed else (stored_down, stored_right)
        return (-1 if flipped_rows else 1) * rows @ down + (-1 if flipped_columns else 1) * columns @ right

    return max(product((False, True), repeat=3), key=nearness)
