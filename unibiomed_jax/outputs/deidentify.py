"""DICOM objects without the patient: identity and dates taken out, UIDs replaced, the same way everywhere."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

# What is written beside objects that were made so, and beside those that were not.
_CLAIM = (
    "Identity, dates and UIDs in the DICOM objects were replaced, alike in all of this folder, so that they "
    "refer to images no archive has. No conformance to a de-identification profile is claimed: pixels, with "
    "faces and text in them, and hashes of them are as they were."
)
_KEPT = "DICOM objects keep the patient and the study, so that an archive can file them; nothing else does."
_METHOD = "Identity, dates, UIDs replaced by UniBiomed: no conformance"
# UIDs that say what a thing is, not which one, begin so.
_STANDARD = "1.2.840.10008."
_PATIENT = 0x0010
# Must be there, and may be empty.
_EMPTIED = {"PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"}
# Of the day on which an object was made, not of the patient's visit.
_OF_TODAY = {
    "ContentDate", "ContentTime", "InstanceCreationDate", "InstanceCreationTime", "SeriesDate", "SeriesTime",
    "StructureSetDate", "StructureSetTime",
}  # fmt: skip


def identity_of(deidentify: bool) -> str:
    """What a record says about the patient's identity."""
    return _CLAIM if deidentify else _KEPT


class Deidentifier:
    """Takes the patient out of objects. Those of one deidentifier go on belonging together.

    UIDs are replaced by random ones, which nobody can compute from those that were there.
    """

    def __init__(self, alias: str):
        # The new name of the patient: study-1 of another folder is somebody else.
        self._name = f"{alias}-{uuid.uuid4().hex[:12]}"
        self._uids: dict[str, str] = {}
        self._made: set[str] = set()

    def __call__(self, dataset: Dataset) -> None:
        """Change an object in place."""
        dataset.walk(self._change)
        dataset.PatientName = dataset.PatientID = self._name
        dataset.DeidentificationMethod = _METHOD
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID

    def _change(self, dataset: Dataset, element: DataElement) -> None:
        name = element.keyword
        if name in _EMPTIED or element.VR == "PN":
            element.value = ""
        elif element.VR == "UI":
            many = element.VM > 1
            values = [self._uid(str(value)) for value in (element.value if many else [element.value])]
            element.value = values if many else values[0]
        elif (
            element.tag.group == _PATIENT
            or element.tag.is_private
            or (element.VR in ("DA", "TM", "DT") and name not in _OF_TODAY)
        ):
            del dataset[element.tag]

    def _uid(self, uid: str) -> str:
        from pydicom.uid import generate_uid

        if not uid or uid.startswith(_STANDARD) or uid in self._made:  # items may stand at several places
            return uid
        if uid not in self._uids:
            self._uids[uid] = str(generate_uid(prefix=None))
            self._made.add(self._uids[uid])
        return self._uids[uid]
