"""One series as an array of values, and where each of its pixels lies in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from unibiomed_jax.studies.dicom_files import Frame
    from unibiomed_jax.studies.windows import Window

# Positions closer than this, mm, are one.
SAME_PLACE = 0.01
# Cosine of the angle between directions that are taken as perpendicular.
PERPENDICULAR = 0.01
# The note of a CT that may have been saved with another zero.
NO_AIR = "no value lies below 0, as that of air would: its scale may not be HU"
# The note of a volume that may lie in the patient either way.
NO_SIDES = "left and right are unknown: the file states no orientation, one was made up"
_PLANES = ("sagittal", "coronal", "axial")
# The normal of a plane that is called by its plain name is within 10 degrees of the body's axis.
_UPRIGHT = np.cos(np.deg2rad(10))


class Aliases:
    """Names of studies and series in all that is printed or written: they are numbered as they are met.

    A number says nothing of what it stands for, where a hash would give away an identity that is guessed.
    """

    def __init__(self):
        self._met: dict[str, list[str]] = {}

    def study(self, identity: str) -> str:
        return self._name("study", identity)

    def series(self, identity: str) -> str:
        return self._name("series", identity)

    def _name(self, kind: str, identity: str) -> str:
        met = self._met.setdefault(kind, [])
        if identity not in met:
            met.append(identity)
        return f"{kind}-{met.index(identity) + 1}"


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where pixels lie: in DICOM's patient coordinates, mm to the patient's left, back and head."""

    # (slices, 3) centre of the first pixel of each slice, mm.
    origins: np.ndarray
    # (3,) from a pixel to that of the next column, mm.
    across: np.ndarray
    # (3,) from a pixel to that of the next row, mm.
    down: np.ndarray
    # Distance that a single slice stands for, mm.
    thickness: float = 1.0

    @cached_property
    def normal(self) -> np.ndarray:
        """(3,) of length 1, along which the slices are sorted."""
        normal = np.cross(self.across, self.down)
        return normal / np.linalg.norm(normal)

    @cached_property
    def step(self) -> np.ndarray:
        """(3,) from a slice to the next as most of them lie, mm."""
        if len(self.origins) == 1:
            return self.normal * self.thickness
        return np.median(np.diff(self.origins, axis=0), axis=0)

    @cached_property
    def uneven(self) -> np.ndarray:
        """Numbers of the slices after which the next does not follow at `step`."""
        apart = np.linalg.norm(np.diff(self.origins, axis=0) - self.step, axis=1)
        return np.flatnonzero(apart > max(SAME_PLACE, 0.01 * np.linalg.norm(self.step)))

    @property
    def tilt(self) -> float:
        """How far a slice is shifted in its own plane against the one before, mm (gantry tilt)."""
        return float(np.linalg.norm(np.cross(self.step, self.normal)))

    @property
    def is_tilted(self) -> bool:
        return self.tilt > SAME_PLACE

    @property
    def is_sheared(self) -> bool:
        """Whether rows and columns are not perpendicular, so that a pixel is no rectangle."""
        lengths = np.linalg.norm(self.across) * np.linalg.norm(self.down)
        return bool(abs(self.across @ self.down) > PERPENDICULAR * lengths)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Between slices (along their normal), rows and columns, mm."""
        between = abs(float(self.step @ self.normal))
        return between, float(np.linalg.norm(self.down)), float(np.linalg.norm(self.across))

    @property
    def plane(self) -> str:
        """axial, coronal or sagittal, "oblique" before it if more than 10 degrees off."""
        along = np.abs(self.normal)
        return ("" if along.max() >= _UPRIGHT else "oblique ") + _PLANES[along.argmax()]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) from numbers of column, row and slice to mm, true of slices at even steps."""
        matrix = np.eye(4)
        matrix[:3] = np.stack([self.across, self.down, self.mean_step, self.origins[0]], axis=1)
        return matrix

    @property
    def mean_step(self) -> np.ndarray:
        """(3,) as `step`, without the rounding errors of single positions."""
        slices = len(self.origins)
        return self.step if slices == 1 else (self.origins[-1] - self.origins[0]) / (slices - 1)

    def points(self, indices: np.ndarray) -> np.ndarray:
        """Where (number, 3) slices, rows and columns lie; rows and columns may be fractions. mm."""
        indices = np.asarray(indices)
        slices, rows, columns = indices[..., 0].astype(int), indices[..., 1:2], indices[..., 2:3]
        return self.origins[slices] + rows * self.down + columns * self.across


@dataclass(frozen=True, eq=False)
class DicomSource:
    """The DICOM objects that a study was read from."""

    # One for each slice of `Study.values`.
    frames: tuple[Frame, ...]


@dataclass(frozen=True, eq=False)
class GridSource:
    """The grid of a volume file, and how its axes became slices, rows and columns."""

    # (4, 4) from numbers of voxels to mm to the patient's left, back and head.
    affine: np.ndarray
    # Which axis of the grid became slices, rows, columns.
    axes: tuple[int, int, int]
    # Slices were counted from the other end.
    reversed_slices: bool
    # Shape of the file's array, further axes of length 1 included.
    shape: tuple[int, ...]
    # The header of a NIfTI file, without its texts and extensions.
    header: Any = None

    def to_grid(self, values: np.ndarray) -> np.ndarray:
        """(slices, rows, columns) in the axes of the file."""
        values = values[::-1] if self.reversed_slices else values
        return values.transpose(np.argsort(self.axes)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Study:
    """A series opened: a volume, a film, or a single picture."""

    # (slices, rows, columns) float32 in the units below; in colour (slices, rows, columns, 3) uint8. Rows and
    # columns are as stored, slices sorted along `geometry.normal`, or in time where there is no geometry.
    values: np.ndarray
    # As DICOM has it (CT, MR, PT, US, ...), or "unknown".
    modality: str
    # HU, SUV, Bq/mL, or "" where values have no fixed scale.
    unit: str
    geometry: Geometry | None
    # Names that stand for study and series in everything that is written.
    study_alias: str
    series_alias: str
    # What is odd about it, a sentence each.
    notes: tuple[str, ...] = ()
    # (slices, rows, columns) true where the scanner measured nothing, or None: everywhere it did.
    padding: np.ndarray | None = None
    # Windows that the file brings.
    own_windows: tuple[Window, ...] = ()
    # Low values are meant to be shown white (MONOCHROME1). `values` are not inverted.
    white_is_low: bool = False
    # DICOM's Body Part Examined, or "".
    body_part: str = ""
    source: DicomSource | GridSource | None = field(default=None, repr=False)
    # Why other files at the path were left out, a sentence each.
    left_out: tuple[str, ...] = field(default=(), repr=False)

    @property
    def is_colour(self) -> bool:
        return self.values.ndim == 4
