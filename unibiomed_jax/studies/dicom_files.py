"""DICOM files: which are, which hold images, and the attributes of each of their frames."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unibiomed_jax.errors import DamagedError, InputError
from unibiomed_jax.studies.place import Place

if TYPE_CHECKING:
    from pydicom import Dataset

EXTRA = "`pip install 'unibiomed-jax[dicom]'`"

# Objects without images of a patient, by their SOP class or the beginning of it.
_NO_IMAGE = {
    "1.2.840.10008.5.1.4.1.1.481.2": "RT dose",
    "1.2.840.10008.5.1.4.1.1.481.3": "RT structure set",
    "1.2.840.10008.5.1.4.1.1.481.5": "RT plan",
    "1.2.840.10008.5.1.4.1.1.481.": "radiotherapy object",
    "1.2.840.10008.5.1.4.1.1.66.": "segmentation",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "whole-slide image",
    "1.2.840.10008.5.1.4.1.1.9.": "waveform",
    "1.2.840.10008.5.1.4.1.1.88.": "structured report",
    "1.2.840.10008.5.1.4.1.1.104.": "encapsulated document",
    "1.2.840.10008.5.1.4.1.1.11.": "presentation state",
    "1.2.840.10008.5.1.4.39.": "colour palette",
    "1.2.840.10008.1.3.10": "DICOMDIR",
}
# With what a file without a preamble begins: (group, element) in both byte orders.
_FIRST_TAGS = {
    group.to_bytes(2, order) + element.to_bytes(2, order)
    for order in ("little", "big")
    for group, elements in ((2, (0, 1, 0x10)), (8, (0, 1, 5, 8, 0x16)))
    for element in elements
}
_REMEDIES = {
    "segmentation": "give the images it was drawn on",
    "RT structure set": "give the images it was drawn on",
    "RT dose": "give the planning CT",
    "whole-slide image": "export a field of it as PNG",
}


@dataclass(frozen=True, eq=False)
class DicomFile:
    """A DICOM object with an image; its pixels are read when they are asked for."""

    place: Place
    header: Dataset

    @property
    def frames(self) -> int:
        return int(self.header.get("NumberOfFrames") or 1)

    @property
    def is_enhanced(self) -> bool:
        """Whether attributes of frames stand in functional groups."""
        return "SharedFunctionalGroupsSequence" in self.header or (
            "PerFrameFunctionalGroupsSequence" in self.header
        )

    def group(self, name: str, frame: int) -> Dataset | None:
        """A functional group of a frame: its own, or the one that all share."""
        for sequence, index in (
            ("PerFrameFunctionalGroupsSequence", frame),
            ("SharedFunctionalGroupsSequence", 0),
        ):
            items = self.header.get(sequence)
            if items is not None and index < len(items) and items[index].get(name):
                return items[index].get(name)[0]
        return None

    def attribute(self, group: str, name: str, frame: int) -> Any:
        """An attribute of a frame, of its functional group or of the object; None where absent or empty."""
        found = self.group(group, frame) if self.is_enhanced else None
        value = None if found is None else found.get(name)
        if value is None and not self.is_enhanced:
            value = self.header.get(name)
        return None if value is None or value == "" else value


@dataclass(frozen=True, eq=False)
class Frame:
    """A single image of a DICOM object."""

    file: DicomFile
    # From 0, in the order of the file.
    number: int

    @cached_property
    def origin(self) -> np.ndarray | None:
        """(3,) centre of the first pixel, mm."""
        return _numbers(self.file.attribute("PlanePositionSequence", "ImagePositionPatient", self.number), 3)

    @cached_property
    def cosines(self) -> np.ndarray | None:
        """(6,) directions of rows (to the next column) and of columns."""
        return _numbers(
            self.file.attribute("PlaneOrientationSequence", "ImageOrientationPatient", self.number), 6
        )

    @cached_property
    def spacing(self) -> np.ndarray | None:
        """(2,) between rows and between columns, mm."""
        return _numbers(self.file.attribute("PixelMeasuresSequence", "PixelSpacing", self.number), 2)

    @property
    def image_type(self) -> tuple[str, ...]:
        value = self.file.header.get("ImageType") or ()
        return (value,) if isinstance(value, str) else tuple(value)

    def __str__(self) -> str:
        number = self.file.header.get("InstanceNumber")
        name = f"instance {number}" if number is not None else str(self.file.place).lower()
        return f"frame {self.number + 1} of {name}" if self.file.frames > 1 else name


def require_pydicom() -> None:
    """Raise InputError unless pydicom is installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise InputError(f"Reading DICOM needs pydicom; install it with {EXTRA}.") from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """pydicom warns of, and highdicom logs, odd values with the values, which may be a patient's name."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: "DICM" after a preamble, or data elements of the first groups at once.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(132)
    if start[128:132] == b"DICM":
        return True
    if len(start) < 16 or start[:4] not in _FIRST_TAGS:
        return False
    return start[4:6].isalpha() or start[6:8] == b"\0\0" or start[4:6] == b"\0\0"


def read_header(place: Place) -> Dataset:
    """The attributes of an object, without its pixels.

    Raises:
        DamagedError: it is damaged.
    """
    from pydicom import dcmread

    try:
        with quietly():
            header = dcmread(place.path, stop_before_pixels=True, force=True)
            _ = header.get("PatientName"), header.get("ImageType")  # a broken character set shows here
    except Exception as error:  # the parser raises whatever it met
        raise DamagedError(
            f"{place} is no readable DICOM ({type(error).__name__}); copy it again from the archive."
        ) from None
    return header


def as_image(place: Place, header: Dataset) -> DicomFile:
    """The object as one with an image.

    Raises:
        InputError: it is none of a patient.
        DamagedError: it is cut off, or has impossible attributes.
    """
    try:
        reason = _why_no_image(header, place)
    except DamagedError:
        raise
    except Exception as error:  # an impossible value raises where it is used, and is told
        raise DamagedError(
            f"{place} has attributes that cannot be understood ({type(error).__name__}); export it again."
        ) from None
    if reason is not None:
        raise InputError(reason)
    return DicomFile(place, header)


def _kind_of(header: Dataset) -> str | None:
    """What an object without an image of a patient is, or None."""
    sop_class = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    matches = [name for name in _NO_IMAGE if sop_class.startswith(name)]
    return _NO_IMAGE[max(matches, key=len)] if matches else None


def _why_no_image(header: Dataset, place: Place) -> str | None:
    """The sentence for an object that is no image of a patient, or None.

    Raises:
        DamagedError: nothing in it says what it is, or it is an image that was cut off.
    """
    from pydicom.uid import UID

    with quietly():
        kind = _kind_of(header)
        if kind is None and header.get("Modality") == "SM":
            kind = "whole-slide image"
        if kind is not None:
            return (
                f"{place} is a DICOM {kind}, no image to ask about; {_REMEDIES.get(kind, 'give the images')}."
            )
        sizes = header.get("Rows"), header.get("Columns")
        if "SOPClassUID" not in header and sizes == (None, None):
            raise DamagedError(f"{place} ends before it says what it is; copy it again from the archive.")
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            if UID(str(header.get("SOPClassUID"))).name.endswith("Image Storage"):
                raise DamagedError(f"{place} ends before its pixels; copy it again from the archive.")
            return f"{place} is DICOM without an image; give a file with pixels."
        if "MOSAIC" in (header.get("ImageType") or ()):
            return f"{place} is a mosaic of slices in one picture; convert the series with dcm2niix first."
        try:
            frames = int(header.get("NumberOfFrames") or 1)
        except (TypeError, ValueError):
            frames = 0
        if frames < 1:
            return f"{place} gives no valid number of frames; export it again from the archive."
    return None


def _numbers(value: Any, count: int) -> np.ndarray | None:
    """`count` finite numbers, or None."""
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None
