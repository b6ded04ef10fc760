"""What is written says nothing of the patient but where an archive needs it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from unibiomed_jax import InputError, open_study, write_study
from unibiomed_jax.config.preprocessing import PREPROCESSING
from unibiomed_jax.outputs.coded_terms import find_term
from unibiomed_jax.outputs.deidentify import Deidentifier
from unibiomed_jax.outputs.study_folder import FORMATS
from unibiomed_jax.studies.grey import choose_window
from unibiomed_jax.studies.windows import Window

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
nibabel = pytest.importorskip("nibabel")

from dicom_series import PLANTED, MadeSeries, save  # noqa: E402

# Identity that an archive files objects by, and the day of the study; nothing of place or free text.
FILED = {"Plantedname", "PLANTED-ID-77", "19010203", "19040506", "PLANTED-ACC"}


def _code() -> pydicom.Dataset:
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "PLANTED-CODE", "99X", "Plantedtext"
    return code


def _person() -> pydicom.Dataset:
    person = pydicom.Dataset()
    person.PersonAddress = person.InstitutionName = "Plantedtext"
    person.PersonTelephoneNumbers, person.LocalNamespaceEntityID = "PLANTED-PHONE", "PLANTED-PHONE"
    person.PersonIdentificationCodeSequence = [_code()]
    return person


ATTRIBUTES = {
    "PatientComments": "Plantedtext",
    "OperatorsName": "Plantedname",
    "OtherPatientIDs": "PLANTED-ID-77",
    "PatientAddress": "Plantedtext",
    "ReferringPhysicianName": "Plantedname^Referring",
    "SeriesDescription": "Plantedtext",
    "ProtocolName": "Plantedtext",
    "StationName": "Plantedtext",
    "RequestedProcedureDescription": "Plantedtext",
    "DeviceSerialNumber": "Plantedtext",
    "ClinicalTrialSubjectID": "PLANTED-ID-77",
    "ImageComments": "Plantedtext",
    "AcquisitionDateTime": "19040506101112",
    "PatientAge": "003Y",
    "AdmissionID": "PLANTED-CODE",
    "ServiceEpisodeID": "PLANTED-CODE",
    "ServiceEpisodeDescription": "Plantedtext",
    "ReasonForVisit": "Plantedtext",
    "AdmittingDiagnosesDescription": "Plantedtext",
    "ReferringPhysicianIdentificationSequence": [_person()],
    "ConsultingPhysicianIdentificationSequence": [_person()],
    "IssuerOfAccessionNumberSequence": [_person()],
    "ProcedureCodeSequence": [_code()],
    "ReasonForVisitCodeSequence": [_code()],
}


def readable(path) -> bytes:
    """All bytes of a file, and those that are packed in it."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data += gzip.decompress(data)
    if path.suffix == ".png":
        with Image.open(path) as picture:
            data += repr(picture.info).encode()
    if path.suffix == ".html":
        for encoded in re.findall(rb"[A-Za-z0-9+/=]{200,}", data):
            with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
                data += repr(picture.info).encode()
    return data


@pytest.mark.parametrize("deidentify", [False, True])
def test_every_output_is_free_of_planted_names_dates_and_paths(tmp_path, capfd, deidentify):
    series = MadeSeries(attributes=ATTRIBUTES)
    study = open_study(series.write(tmp_path / "Plantedname_A"))
    mask = np.zeros(study.values.shape, bool)
    mask[2:4, 4:9, 10:13] = True
    window = choose_window(study, PREPROCESSING["tiny"])
    out = tmp_path / "out"
    masks = {"liver in abdomen CT": mask, "spleen": np.zeros_like(mask)}
    write_study(study, masks, out, FORMATS, window=window, deidentify=deidentify)
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "labelmap.dcm", "mask_1_liver_in_abdomen_ct.nii.gz", "mask_2_spleen.nii.gz", "masks_coco.json",
        "overlay_0003.dcm", "overlay_0003.png", "overlay_0004.dcm", "overlay_0004.png", "rtstruct.dcm",
        "seg.dcm", "study.html", "study.json",
    ]  # fmt: skip
    uids = {series.uid, series.study, series.frame_of_reference}
    uids |= {str(frame.file.header.SOPInstanceUID) for frame in study.source.frames}
    for path in out.iterdir():
        data = readable(path)
        is_filed = path.suffix == ".dcm" and not deidentify
        for word in {
            *PLANTED,
            "PLANTED-CODE",
            "PLANTED-PHONE",
            str(tmp_path),
            "Plantedname_A",
            "003Y",
            *uids,
        }:
            if not is_filed or word not in {*FILED, *uids}:
                assert word.encode() not in data, (path.name, word)
    objects = {path.stem: pydicom.dcmread(path) for path in out.glob("*.dcm")}
    if deidentify:
        ((name, number),) = {(str(o.PatientName), str(o.PatientID)) for o in objects.values()}
        assert name == number and re.fullmatch(r"study-1-[0-9a-f]{12}", name)
        assert all("no conformance" in found.DeidentificationMethod for found in objects.values())
    else:
        assert {str(found.PatientID) for found in objects.values()} == {"PLANTED-ID-77"}
        assert {found.StudyInstanceUID for found in objects.values()} == {series.study}
    # They go on belonging together, and to the same images.
    assert len({found.StudyInstanceUID for found in objects.values()}) == 1
    assert len({found.SOPInstanceUID for found in objects.values()}) == len(objects)
    seg, structures = objects["seg"], objects["rtstruct"]
    assert seg.FrameOfReferenceUID == structures.FrameOfReferenceUID
    (referenced,) = structures.ReferencedFrameOfReferenceSequence
    (referenced,) = referenced.RTReferencedStudySequence
    assert referenced.ReferencedSOPInstanceUID == seg.StudyInstanceUID
    (referenced,) = referenced.RTReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == seg.ReferencedSeriesSequence[0].SeriesInstanceUID
    images = {item.ReferencedSOPInstanceUID for item in referenced.ContourImageSequence}
    for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence:
        assert item.ReferencedSOPInstanceUID in images
    for found in objects.values():
        assert found.file_meta.MediaStorageSOPInstanceUID == found.SOPInstanceUID
    printed, logged = capfd.readouterr()
    assert not any(word in printed + logged for word in PLANTED)

    record = json.loads((out / "study.json").read_text())
    assert record["window"] == {"low": -160, "high": 240, "from": "preset soft tissue"}
    liver, spleen = record["masks"]
    assert liver["volume_ml"] == pytest.approx(30 * 2.5 * 0.9 * 0.7 / 1000, abs=1e-5)
    assert liver["slices"] == [3, 4] and spleen["slices"] is None
    assert record["study"] == study.study_alias and record["files"]["sc"] == [
        "overlay_0003.dcm",
        "overlay_0004.dcm",
    ]
    assert ("No conformance" in record["identity"]) == deidentify
    if shutil.which("dciodvfy"):
        for name in ("overlay_0003", "seg", "rtstruct"):
            run = subprocess.run(["dciodvfy", out / f"{name}.dcm"], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
    capture = pydicom.dcmread(out / "overlay_0003.dcm")
    assert capture.BurnedInAnnotation == "YES" and "research use" in capture.DerivationDescription
    assert list(capture.PatientOrientation) == ["L", "P"]
    with Image.open(out / "overlay_0003.png") as picture:
        np.testing.assert_array_equal(capture.pixel_array, np.asarray(picture))


def test_patients_are_told_apart_and_series_of_one_study_stay_together(tmp_path):
    made = MadeSeries(shape=(1, 20, 16))
    study = open_study(save(made.slice(0), tmp_path / "a"))
    mask = np.ones(study.values.shape, bool)
    shared = Deidentifier(study.study_alias)
    names = []
    for number, deidentify in enumerate((True, True, shared, shared)):
        write_study(study, {"x": mask}, tmp_path / str(number), ["seg"], deidentify=deidentify)
        written = pydicom.dcmread(tmp_path / str(number) / "seg.dcm")
        names.append((str(written.PatientID), written.StudyInstanceUID, written.FrameOfReferenceUID))
    assert len(set(names)) == 3 and names[2] == names[3]


@pytest.mark.parametrize(
    "name",
    [
        "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
        "AccessionNumber", "ReferringPhysicianName", "SliceThickness",
    ],
)  # fmt: skip
def test_attributes_that_may_be_empty_may_be_absent(tmp_path, name):
    image = MadeSeries(shape=(1, 20, 16)).slice(0)
    del image[name]
    study = open_study(save(image, tmp_path / "a"))
    mask = np.ones(study.values.shape, bool)
    window = Window(-160, 240, "stated")
    write_study(study, {"x": mask}, tmp_path / "out", ["seg", "rtstruct", "sc"], window=window)
    assert pydicom.dcmread(tmp_path / "out" / "seg.dcm").SegmentSequence[0].SegmentLabel == "x"
    assert name not in study.source.frames[0].file.header  # what was read is as it was


def test_a_folder_that_exists_and_a_picture_without_a_window_are_refused(tmp_path):
    study = open_study(MadeSeries().write(tmp_path / "in"))
    mask = np.ones(study.values.shape, bool)
    with pytest.raises(InputError, match="needs a window"):
        write_study(study, {"liver": mask}, tmp_path / "out", ["nifti", "png"])
    assert not list(tmp_path.glob("*out*"))  # nothing half written is left
    with pytest.raises(InputError, match="There is no format 'dicom'"):
        write_study(study, {"liver": mask}, tmp_path / "out", ["dicom"])
    write_study(study, {"liver": mask}, tmp_path / "out", ["nifti"])
    with pytest.raises(InputError, match="exists"):
        write_study(study, {"liver": mask}, tmp_path / "out", ["nifti"])


def test_codes_are_from_the_table_and_never_guessed(tmp_path):
    study = open_study(MadeSeries().write(tmp_path / "in"))
    phrases = (
        "left kidney",
        "liver tumor in abdomen CT",
        "right ventricle",
        "horseshoe kidney",
        "odd lesion",
    )
    masks = {}
    for number, phrase in enumerate(phrases):
        masks[phrase] = np.zeros(study.values.shape, bool)
        masks[phrase][number % 6, 3, number] = True
    write_study(study, masks, tmp_path / "out", ["seg"])
    segments = pydicom.dcmread(tmp_path / "out" / "seg.dcm").SegmentSequence
    kidney, tumor, ventricle, odd, lesion = (item.SegmentedPropertyTypeCodeSequence[0] for item in segments)
    assert (kidney.CodeValue, kidney.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    assert tumor.CodeValue == "108369006" and segments[1].AnatomicRegionSequence[0].CodeValue == "10200004"
    assert ventricle.CodeValue == "53085002" and "SegmentedPropertyTypeModifierCodeSequence" not in ventricle
    assert (odd.CodingSchemeDesignator, odd.CodeMeaning) == ("99UNIBIOMED", "horseshoe kidney")
    assert lesion.CodeValue == "52988006"
    assert [item.SegmentAlgorithmType for item in segments] == ["AUTOMATIC"] * 5
    assert find_term("kidneys").property_type == find_term("the kidney").property_type
    assert find_term("tumor of the liver").region == find_term("liver").property_type
    assert find_term("").property_type is None


def test_pictures_are_turned_as_slices_are_looked_at(tmp_path):
    """The patient's right at the left of the picture, and the front at the top, however it is stored."""
    nibabel = pytest.importorskip("nibabel")
    voxels = np.zeros((8, 6, 3), np.int16)
    voxels[7, 5, 1] = 1000  # axes run to the right, the front and the head
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 4.0, 1.0])), tmp_path / "a.nii")
    study = open_study(tmp_path / "a.nii", modality="MR")
    mask = study.values > 500
    assert mask.sum() == 1
    write_study(study, {"x": mask}, tmp_path / "out", ["png"], window=Window(0, 2000, "numbers"))
    with Image.open(tmp_path / "out" / "overlay_0002.png") as picture:
        pixels = np.asarray(picture)
    rows, columns = np.nonzero(pixels[: pixels.shape[1] * 6 // 8].max(-1))  # the legend lies below
    assert rows.mean() < pixels.shape[1] * 6 / 8 / 3 and columns.mean() < pixels.shape[1] / 3
