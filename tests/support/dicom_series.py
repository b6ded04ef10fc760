"""Invented DICOM series, of every orientation and oddity, for the tests of studies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT, MR, PT = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "4", "128"))
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
# What must never leave for logs and records.
PLANTED = (
    "Plantedname",
    "PLANTED-ID-77",
    "19010203",
    "19040506",
    "Plantedhospital",
    "PLANTED-ACC",
    "Plantedtext",
)

_HALF = np.sqrt(0.5)
# Direction cosines of rows and columns.
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "oblique": (_HALF, _HALF * 0.6, _HALF * 0.8, -_HALF, _HALF * 0.6, _HALF * 0.8),
    "feet_first": (-1, 0, 0, 0, 1, 0),
    "negated": (1, 0, 0, 0, -1, 0),
}


@dataclass
class MadeSeries:
    """A series to write: a grid in the patient, and values that tell every pixel apart."""

    cosines: tuple[float, ...] = ORIENTATIONS["axial"]
    # Slices, rows, columns.
    shape: tuple[int, int, int] = (6, 20, 16)
    # Between slices, rows, columns, mm.
    spacing: tuple[float, float, float] = (2.5, 0.9, 0.7)
    corner: tuple[float, float, float] = (-31.5, 12.25, -140.0)
    # Shift from slice to slice in the direction of the columns, mm.
    tilt: float = 0.0
    modality: str = "CT"
    # Further attributes of every object.
    attributes: dict = field(default_factory=dict)
    signed: bool = True
    slope: float = 1.0
    intercept: float = -1024.0

    def __post_init__(self):
        self.uid, self.frame_of_reference, self.study = (str(generate_uid(prefix=None)) for _ in range(3))
        self.stored = (
            np.random.default_rng(0)
            .integers(0, 2000, self.shape)
            .astype(np.int16 if self.signed else np.uint16)
        )

    @property
    def values(self) -> np.ndarray:
        return (self.stored * self.slope + self.intercept).astype(np.float32)

    @property
    def origins(self) -> np.ndarray:
        rows, columns = np.array(self.cosines).reshape(2, 3)
        step = np.cross(rows, columns) * self.spacing[0] + columns * self.tilt
        return np.array(self.corner) + np.arange(self.shape[0])[:, None] * step

    def point(self, index: int, row: float, column: float) -> np.ndarray:
        """Where a pixel lies by DICOM's equation C.7.6.2.1-1, mm."""
        rows, columns = np.array(self.cosines).reshape(2, 3)
        return self.origins[index] + rows * self.spacing[2] * column + columns * self.spacing[1] * row

    def slice(self, index: int) -> Dataset:
        """One slice as an object of its own."""
        dataset = self._object({"CT": CT, "MR": MR, "PT": PT}.get(self.modality, CT))
        dataset.InstanceNumber = self.shape[0] - index  # geometry must not follow it
        dataset.ImagePositionPatient = [round(float(value), 6) for value in self.origins[index]]
        dataset.ImageOrientationPatient = [round(float(value), 9) for value in self.cosines]
        dataset.PixelSpacing = [self.spacing[1], self.spacing[2]]
        dataset.SliceThickness = 99.0  # nor this
        dataset.RescaleSlope, dataset.RescaleIntercept = self.slope, self.intercept
        dataset.PixelData = self.stored[index].tobytes()
        return self._finish(dataset)

    def write(self, folder: Path, names: list[str] | None = None, skip: tuple[int, ...] = ()) -> Path:
        """Write the slices under names that say nothing of their order."""
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(1).permutation(self.shape[0])
        for name, index in enumerate(order.tolist()):
            if index not in skip:
                save(self.slice(index), folder / (names[index] if names else f"IM{name:05d}"))
        return folder

    def enhanced(self, *, times: int = 1) -> Dataset:
        """All slices as one object, its frames in another order than their places."""
        dataset = self._object(ENHANCED_CT)
        dataset.InstanceNumber = 1
        order = np.random.default_rng(2).permutation(self.shape[0]).tolist() * times
        dataset.NumberOfFrames = len(order)
        shared, orientation, measures, scale = Dataset(), Dataset(), Dataset(), Dataset()
        orientation.ImageOrientationPatient = [round(float(value), 9) for value in self.cosines]
        measures.PixelSpacing, measures.SliceThickness = [self.spacing[1], self.spacing[2]], self.spacing[0]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = self.slope, self.intercept, "HU"
        shared.PlaneOrientationSequence = Sequence([orientation])
        shared.PixelMeasuresSequence = Sequence([measures])
        shared.PixelValueTransformationSequence = Sequence([scale])
        dataset.SharedFunctionalGroupsSequence = Sequence([shared])
        frames = []
        for number, index in enumerate(order):
            frame, place, content = Dataset(), Dataset(), Dataset()
            place.ImagePositionPatient = [round(float(value), 6) for value in self.origins[index]]
            content.TemporalPositionIndex = 1 + number // self.shape[0]
            content.StackID, content.InStackPositionNumber = "1", index + 1
            content.DimensionIndexValues = [1 + number // self.shape[0], index + 1]
            frame.PlanePositionSequence, frame.FrameContentSequence = Sequence([place]), Sequence([content])
            frames.append(frame)
        dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
        dataset.PixelData = b"".join(self.stored[index].tobytes() for index in order)
        return self._finish(dataset)

    def _object(self, sop_class: str) -> Dataset:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(prefix=None)
        dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = (
            "Plantedname^A",
            "PLANTED-ID-77",
            "19010203",
        )
        dataset.PatientSex, dataset.StudyDate, dataset.StudyTime = "O", "19040506", "101112"
        dataset.SeriesDate = dataset.ContentDate = dataset.AcquisitionDate = "19040506"
        dataset.SeriesTime = dataset.ContentTime = dataset.AcquisitionTime = "101112"
        dataset.AccessionNumber, dataset.StudyID, dataset.ReferringPhysicianName = "PLANTED-ACC", "1", ""
        dataset.InstitutionName, dataset.StudyDescription = "Plantedhospital", "Plantedtext"
        dataset.Modality, dataset.SeriesNumber, dataset.Manufacturer = self.modality, 3, "made"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = self.study, self.uid
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = self.frame_of_reference, ""
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        return dataset

    def _finish(self, dataset: Dataset) -> Dataset:
        dataset.Rows, dataset.Columns = self.shape[1:]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = int(self.signed)
        for name, value in self.attributes.items():
            setattr(dataset, name, value)
        return dataset


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path
