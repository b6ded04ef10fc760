"""Masks as a DICOM RT Structure Set: outlines in millimetres, slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.masks.overlay import NOTICE, PALETTE
from unibiomed_jax.outputs import dicom_objects
from unibiomed_jax.outputs.deidentify import Deidentifier
from unibiomed_jax.outputs.outlines import trace
from unibiomed_jax.studies.dicom_files import Frame
from unibiomed_jax.studies.study import Study

if TYPE_CHECKING:
    from pydicom import Dataset

_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_MODALITIES = ("CT", "MR", "PT")


def write_rtstruct(
    path: Path, study: Study, masks: Mapping[str, np.ndarray], *, deidentify: Deidentifier | None = None
) -> None:
    """Write a structure set with a region of interest for each phrase.

    Outlines run along the edges of pixels, each in the plane of its own slice; holes are outlines of their
    own, of which an even number of times inside means outside.

    Args:
        path: of the new file.
        study: a CT, MR or PET volume from DICOM.
        masks: phrase -> (slices, rows, columns) bool, none of them empty.
        deidentify: takes the patient out of it.

    Raises:
        InputError: the study is another one, or its attributes are incomplete.
    """
    frames = dicom_objects.dicom_frames(study, "RTSTRUCT")
    header = frames[0].file.header
    if study.geometry is None or study.modality not in _MODALITIES or not header.get("FrameOfReferenceUID"):
        raise InputError(
            f"RTSTRUCT describes CT, MR and PET with a frame of reference, which {study.series_alias} "
            f"({study.modality}) is not; write 'seg' or 'sc'."
        )
    with dicom_objects.written(study, "RTSTRUCT"):
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian

        structures = Dataset()
        structures.file_meta = FileMetaDataset()
        structures.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        structures.file_meta.MediaStorageSOPClassUID = structures.SOPClassUID = _CLASS
        structures.SOPInstanceUID = dicom_objects.new_uid()
        structures.file_meta.MediaStorageSOPInstanceUID = structures.SOPInstanceUID
        for name in dicom_objects.FILED:
            if name in header:
                structures[name] = header[name]
            elif name != "SpecificCharacterSet":
                setattr(structures, name, "")
        now = datetime.now()
        structures.StructureSetDate = structures.InstanceCreationDate = now.strftime("%Y%m%d")
        structures.StructureSetTime = structures.InstanceCreationTime = now.strftime("%H%M%S")
        structures.Modality = "RTSTRUCT"
        structures.OperatorsName = ""
        structures.SeriesInstanceUID = dicom_objects.new_uid()
        structures.SeriesNumber = dicom_objects.SERIES_NUMBER
        structures.SeriesDescription = "UniBiomed structures"
        structures.InstanceNumber = 1
        structures.Manufacturer = dicom_objects.MAKER
        structures.ManufacturerModelName = "UniBiomed in JAX"
        structures.SoftwareVersions = version(dicom_objects.MAKER)
        structures.StructureSetLabel = "UNIBIOMED"
        structures.StructureSetDescription = NOTICE
        structures.FrameOfReferenceUID = header.FrameOfReferenceUID
        structures.PositionReferenceIndicator = header.get("PositionReferenceIndicator") or ""
        structures.ReferencedFrameOfReferenceSequence = [_references(frames)]
        structures.StructureSetROISequence = []
        structures.ROIContourSequence = []
        structures.RTROIObservationsSequence = []
        for number, (phrase, mask) in enumerate(masks.items(), 1):
            _add(structures, number, phrase, mask, study, frames)
        structures.ApprovalStatus = "UNAPPROVED"
        dicom_objects.save(structures, path, deidentify)


def _references(frames: tuple[Frame, ...]) -> Dataset:
    """All images of the series, by study."""
    header = frames[0].file.header
    series = _item(SeriesInstanceUID=header.SeriesInstanceUID)
    files = {id(frame.file): frame for frame in frames}
    series.ContourImageSequence = [
        _item(
            ReferencedSOPClassUID=frame.file.header.SOPClassUID,
            ReferencedSOPInstanceUID=frame.file.header.SOPInstanceUID,
        )
        for frame in files.values()
    ]
    study = _item(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=header.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return _item(FrameOfReferenceUID=header.FrameOfReferenceUID, RTReferencedStudySequence=[study])


def _add(
    structures: Dataset, number: int, phrase: str, mask: np.ndarray, study: Study, frames: tuple[Frame, ...]
) -> None:
    structures.StructureSetROISequence.append(
        _item(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=structures.FrameOfReferenceUID,
            ROIName=dicom_objects.label(phrase),
            ROIGenerationAlgorithm="AUTOMATIC",
        )
    )
    contours = []
    for index in np.flatnonzero(mask.any((1, 2))).tolist():
        for outline in trace(mask[index]):
            points = study.geometry.points(np.insert(outline, 0, index, axis=1))
            contours.append(
                _item(
                    ContourImageSequence=[_reference(frames[index])],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[_decimal(value) for value in points.ravel()],
                )
            )
    structures.ROIContourSequence.append(
        _item(
            ROIDisplayColor=list(PALETTE[(number - 1) % len(PALETTE)]),
            ContourSequence=contours,
            ReferencedROINumber=number,
        )
    )
    structures.RTROIObservationsSequence.append(
        _item(
            ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter=""
        )
    )


def _reference(frame: Frame) -> Dataset:
    header = frame.file.header
    reference = _item(
        ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID
    )
    if frame.file.frames > 1:
        reference.ReferencedFrameNumber = frame.number + 1
    return reference


def _item(**attributes) -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return item


def _decimal(value: float) -> str:
    """A number of at most 16 characters, to a micrometre or better."""
    return f"{value + 0.0:.6f}".rstrip("0").rstrip(".")[: dicom_objects.SHORT]
