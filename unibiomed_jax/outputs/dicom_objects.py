"""What DICOM objects made from a series have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from unibiomed_jax.errors import InputError
from unibiomed_jax.outputs.deidentify import Deidentifier
from unibiomed_jax.studies.dicom_files import EXTRA, Frame, quietly, read_header
from unibiomed_jax.studies.place import Place
from unibiomed_jax.studies.study import DicomSource, Study

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

MAKER = "unibiomed-jax"
# A series number beyond those of scanners.
SERIES_NUMBER = 9001
# Longest text of the value representations LO and SH.
LONG, SHORT = 64, 16
# Of the patient and the study, without which an archive cannot file an object; all else of them is left out.
FILED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
    "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "SpecificCharacterSet",
)  # fmt: skip
# Of the image itself: what it is, and the groups of its acquisition, place, pixels and frames.
_OF_IMAGE = ("SOPClassUID", "SOPInstanceUID", "ImageType", "Modality")
_GROUPS = (0x0018, 0x0020, 0x0028, 0x5200)
# What highdicom copies of those groups, or adds by itself, and no archive needs.
_LEFT_OUT = {"ImageComments", "ContributingEquipmentSequence"}
# By which an archive tells patients and studies apart.
_IDENTITY = ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "AccessionNumber")


def maker() -> dict[str, str]:
    """The equipment module, as highdicom's arguments."""
    return {
        "manufacturer": MAKER,
        "manufacturer_model_name": "UniBiomed in JAX",
        "software_versions": version(MAKER),
        "device_serial_number": "none",
    }


def label(phrase: str) -> str:
    """A phrase as the value representation LO takes it: 64 characters, no backslash."""
    return (" ".join(phrase.replace("\\", "/").split()) or "unnamed region")[:LONG]


def new_uid() -> str:
    """A UID made from a random number (2.25), under nobody's root."""
    from pydicom.uid import generate_uid

    return str(generate_uid(prefix=None))


def dicom_frames(study: Study, what: str) -> tuple[Frame, ...]:
    """The frames of a study from DICOM.

    Raises:
        InputError: it does not come from DICOM; `what` could not refer to anything.
    """
    if not isinstance(study.source, DicomSource):
        raise InputError(
            f"{what} refers to a DICOM series, which {study.series_alias} is not; open the series itself, or "
            "write NIfTI."
        )
    return study.source.frames


def source_header(header: Dataset) -> Dataset:
    """The header of an image as highdicom is given it, which copies all that it finds of patient and study.

    What must be there but may be empty is; elements are shared with the whole header.
    """
    from pydicom.datadict import keyword_for_tag
    from pydicom.dataset import Dataset

    kept = [
        tag for tag in header.keys() if tag.group in _GROUPS or keyword_for_tag(tag) in (*FILED, *_OF_IMAGE)
    ]
    source = Dataset()
    source.update({tag: header[tag] for tag in kept})
    source.file_meta = header.file_meta
    for name in FILED:
        if name not in source and name not in ("StudyInstanceUID", "SpecificCharacterSet"):
            setattr(source, name, "")
    if "SliceThickness" not in source:
        source.SliceThickness = None
    return source


@contextlib.contextmanager
def written(study: Study, what: str) -> Iterator[None]:
    """Turn what highdicom and pydicom refuse into a sentence without the values they name.

    Raises:
        InputError: the series lacks what the object needs, or highdicom is not installed.
    """
    try:
        with quietly():
            yield
    except ImportError:
        raise InputError(f"Writing {what} needs highdicom; install it with {EXTRA}.") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{what} cannot be made from {study.series_alias}: its DICOM attributes are incomplete "
            f"({type(error).__name__}); write another format, or export the series again."
        ) from None


def save(dataset: Dataset, path: Path, deidentify: Deidentifier | None) -> None:
    """Write an object with a preamble and its meta group, without the texts that no archive needs."""
    from pydicom.dataset import Dataset

    written = Dataset()
    written.update({tag: dataset[tag] for tag in dataset.keys()})
    written = deepcopy(written)  # it shares elements with the headers of the study
    written.file_meta = deepcopy(dataset.file_meta)
    written.walk(_leave_out)
    if deidentify is not None:
        deidentify(written)
    written.save_as(path, enforce_file_format=True)


def belongs_to(path: Path, study: Study) -> bool:
    """Whether an object written from a series still names its patient, its study and its images.

    Args:
        path: of an object that keeps the patient.
        study: from DICOM.
    """
    frames = dicom_frames(study, "An object")
    header = frames[0].file.header
    known = {
        "ReferencedSOPInstanceUID": {frame.file.header.get("SOPInstanceUID") for frame in frames}
        | {header.get("StudyInstanceUID")},
        "FrameOfReferenceUID": {header.get("FrameOfReferenceUID")},
    }
    try:
        written = read_header(Place(path))
        return all(str(written.get(name) or "") == str(header.get(name) or "") for name in _IDENTITY) and all(
            element.value in known.get(element.keyword, (element.value,)) for element in written.iterall()
        )
    except InputError:  # damaged
        return False


def _leave_out(dataset: Dataset, element: DataElement) -> None:
    if element.keyword in _LEFT_OUT:
        del dataset[element.tag]
