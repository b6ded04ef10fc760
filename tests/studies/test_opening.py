"""Whatever an archive gives: opened as it lies in the patient, or refused with a sentence."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unibiomed_jax import InputError, open_study, write_study
from unibiomed_jax.studies.opening import list_series

pydicom = pytest.importorskip("pydicom")

from dicom_series import ORIENTATIONS, PLANTED, MadeSeries, save  # noqa: E402
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataelem import RawDataElement  # noqa: E402
from pydicom.tag import Tag  # noqa: E402

SEG_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"


def test_volumes_are_sorted_by_place_whatever_their_names(tmp_path):
    for kind, cosines in ORIENTATIONS.items():
        series = MadeSeries(cosines)
        study = open_study(series.write(tmp_path / kind / "PAT001" / "deep"))
        assert study.values.dtype == np.float32 and study.unit == "HU" and study.modality == "CT"
        np.testing.assert_array_equal(study.values, series.values)
        np.testing.assert_allclose(study.geometry.spacing, series.spacing, atol=1e-6)
        assert study.geometry.plane == {"oblique": "oblique coronal"}.get(
            kind, kind if kind in ("sagittal", "coronal") else "axial"
        )
        index = np.array([[3, 4.0, 5.0]])
        np.testing.assert_allclose(study.geometry.points(index)[0], series.point(3, 4, 5), atol=1e-4)


def test_enhanced_objects_are_sorted_by_place_and_split_by_time(tmp_path):
    series = MadeSeries()
    study = open_study(save(series.enhanced(), tmp_path / "one"))
    np.testing.assert_array_equal(study.values, series.values)
    path = save(series.enhanced(times=3), tmp_path / "three")
    with pytest.raises(InputError, match="There are 3 series: 1: .* choose one"):
        open_study(path)
    np.testing.assert_array_equal(open_study(path, "2").values, series.values)


def test_stored_values_become_modality_values(tmp_path):
    padded = MadeSeries(slope=-1.0, attributes={"PhotometricInterpretation": "MONOCHROME1"})
    padded.stored[0, 0, :4] = -2000
    padded.attributes["PixelPaddingValue"] = -2000
    study = open_study(padded.write(tmp_path / "padded"))
    np.testing.assert_array_equal(study.values, padded.values)  # not inverted
    assert study.white_is_low
    assert study.padding.sum() == 4 and study.padding[0, 0, :4].all()
    # Slopes that differ from slice to slice.
    mixed = MadeSeries(modality="MR", intercept=0.0)
    for index in range(6):
        dataset = mixed.slice(index)
        dataset.RescaleSlope = 1 + index
        save(dataset, tmp_path / "mixed" / f"{9 - index}.dcm")
    study = open_study(tmp_path / "mixed")
    np.testing.assert_array_equal(study.values, mixed.values * np.arange(1, 7)[:, None, None])


def test_localizers_copies_and_other_objects_do_not_reach_the_volume(tmp_path):
    series = MadeSeries()
    folder = series.write(tmp_path / "in")
    scout = MadeSeries(ORIENTATIONS["coronal"])
    scout.uid = series.uid
    dataset = scout.slice(0)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save(dataset, folder / "scout")
    shutil.copy(folder / "IM00000", folder / "IM00000 copy")
    for name in ("liver_1frame.dcm", "rtdose.dcm", "waveform_ecg.dcm", "reportsi.dcm", "rtplan.dcm"):
        shutil.copy(get_testdata_file(name), folder / name)
    (folder / "notes.txt").write_text("Plantedname")
    (folder / "empty.dcm").touch()
    (folder / ".DS_Store").write_text("hidden")
    listing = list_series(folder)
    assert len(listing.left_out) == 7 and not any("Planted" in reason for reason in listing.left_out)
    assert sum("segmentation" in reason for reason in listing.left_out) == 1
    study = open_study(folder)
    np.testing.assert_array_equal(study.values, series.values)
    assert study.notes == ("copies of the same images left out: 1", "localizer images left out: 1")


def test_doubled_places_are_dropped_if_equal_and_refused_with_both_if_not(tmp_path):
    series = MadeSeries()
    folder = series.write(tmp_path / "in")
    double = series.slice(2)
    double.InstanceNumber = 77
    save(double, folder / "double")
    study = open_study(folder)
    np.testing.assert_array_equal(study.values, series.values)
    assert study.geometry.spacing[0] == pytest.approx(2.5)
    assert study.notes == (
        "images at the place of another: 1",
        "they have the same pixels and were left out",
    )
    double.PixelData = (series.stored[2] + 1).tobytes()
    save(double, folder / "double")
    with pytest.raises(InputError, match="two different images at one place .instance 4 and instance 77"):
        open_study(folder)


def test_mixed_orientations_and_several_series_are_listed_to_choose_from(tmp_path):
    axial, sagittal = MadeSeries(), MadeSeries(ORIENTATIONS["sagittal"])
    sagittal.uid = axial.uid
    folder = axial.write(tmp_path / "in" / "a")
    sagittal.write(tmp_path / "in" / "b")
    with pytest.raises(InputError) as error:
        open_study(tmp_path / "in")
    assert "axial, 6 x 20 x 16" in str(error.value) and "sagittal, 6 x 20 x 16" in str(error.value)
    np.testing.assert_array_equal(open_study(tmp_path / "in", 2).values, sagittal.values)
    with pytest.raises(InputError, match="2 parts"):
        open_study(tmp_path / "in", axial.uid)
    with pytest.raises(InputError, match="no series 'x'"):
        open_study(tmp_path / "in", "x")
    assert len(open_study(folder, axial.uid).values) == 6
    assert open_study(folder, modality="CT").modality == "CT"
    with pytest.raises(InputError, match="is CT, not MR"):
        open_study(folder, modality="MR")


def test_echoes_at_the_same_places_are_volumes_of_their_own(tmp_path):
    first = MadeSeries(modality="MR", attributes={"EchoTime": 10.0})
    second = MadeSeries(modality="MR", attributes={"EchoTime": 80.0})
    second.uid, second.stored = first.uid, first.stored[::-1].copy()
    first.write(tmp_path / "in" / "1")
    second.write(tmp_path / "in" / "2")
    with pytest.raises(InputError, match="2 series"):
        open_study(tmp_path / "in")
    np.testing.assert_array_equal(open_study(tmp_path / "in", 2).values, second.values)


def test_suv_only_with_what_it_needs(tmp_path):
    def pet(**attributes) -> MadeSeries:
        dose = pydicom.Dataset()
        dose.RadionuclideTotalDose, dose.RadionuclideHalfLife = 3.7e8, 6586.2
        dose.RadiopharmaceuticalStartTime = "091112"
        return MadeSeries(
            modality="PT",
            intercept=0.0,
            attributes={
                "Units": "BQML",
                "CorrectedImage": ["ATTN", "DECY"],
                "DecayCorrection": "START",
                "PatientWeight": 70.0,
                "WindowCenter": 5000.5,
                "WindowWidth": 10001,
                "RadiopharmaceuticalInformationSequence": [dose],
                **attributes,
            },
        )

    series = pet()
    study = open_study(series.write(tmp_path / "suv"))
    # Injected at 9:11:12, scanned at 10:11:12.
    factor = 70_000 / (3.7e8 * 2 ** (-3600 / 6586.2))
    np.testing.assert_allclose(study.values, series.values * factor, rtol=1e-5)
    assert study.unit == "SUV"
    assert study.own_windows[0].high == pytest.approx(10_000 * factor)
    study = open_study(pet(DecayCorrection="ADMIN").write(tmp_path / "admin"))
    np.testing.assert_allclose(study.values, series.values * 70_000 / 3.7e8, rtol=1e-5)
    study = open_study(pet(Units="GML").write(tmp_path / "gml"))
    np.testing.assert_array_equal(study.values, series.values)
    for name, changed in {
        "weight": {"PatientWeight": 0},
        "times": {"SeriesTime": "080000", "AcquisitionTime": "080000", "AcquisitionDate": "19040501"},
        "corrections": {"CorrectedImage": ["ATTN"]},
        "dose": {"RadiopharmaceuticalInformationSequence": None},
    }.items():
        study = open_study(pet(**changed).write(tmp_path / name))
        if name == "times":  # before midnight: 22 h 48 min later
            assert study.unit == "SUV"
            continue
        assert study.unit == "Bq/mL" and any("no SUV" in note for note in study.notes), name
        np.testing.assert_array_equal(study.values, series.values)


def test_a_dicomdir_stands_for_the_files_it_lists(tmp_path):
    folder = Path(get_testdata_file("DICOMDIR")).parent
    assert len(list_series(folder / "DICOMDIR").series) > 10
    # Seven slices turned about an axis are no volume, but seven.
    radial = [found for found in list_series(folder / "98892003").series if "stack 1 of 7" in found.notes]
    assert len(radial) == 1 and radial[0].shape[0] == 1
    shutil.copy(folder / "DICOMDIR", tmp_path)
    with pytest.raises(InputError, match="files that the DICOMDIR lists are missing"):
        open_study(tmp_path / "DICOMDIR")


def test_a_file_of_a_dicomdir_is_named_by_its_number_there(tmp_path):
    folder = Path(get_testdata_file("DICOMDIR")).parent
    shutil.copytree(folder, tmp_path / "in")
    listed = [
        record.ReferencedFileID
        for record in pydicom.dcmread(folder / "DICOMDIR").DirectoryRecordSequence
        if "ReferencedFileID" in record
    ]
    (tmp_path / "in").joinpath(*listed[2]).write_bytes(b"Plantedname" * 30)
    (reason,) = list_series(tmp_path / "in" / "DICOMDIR").left_out
    assert reason.startswith("File 3 of the DICOMDIR ")


def test_a_series_uid_that_two_patients_share_does_not_mix_them(tmp_path):
    first, second = MadeSeries(), MadeSeries(attributes={"PatientID": "other"})
    second.uid, second.study = first.uid, first.study
    second.frame_of_reference = first.frame_of_reference
    first.write(tmp_path / "in" / "a")
    second.corner = (-31.5, 12.25, -200.0)  # its slices would go on where the others end
    second.stored = second.stored + 1
    second.write(tmp_path / "in" / "b")
    with pytest.raises(InputError, match="2 series"):
        open_study(tmp_path / "in")
    np.testing.assert_array_equal(open_study(tmp_path / "in", 2).values, second.values)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    series = MadeSeries()
    outside = save(series.slice(0), tmp_path / "Plantedname" / "x")
    (tmp_path / "in").mkdir()
    os.symlink(outside, tmp_path / "in" / "a")
    os.symlink(outside.parent, tmp_path / "in" / "b")
    with pytest.raises(InputError) as error:
        open_study(tmp_path / "in")
    assert "link" in str(error.value) and "Planted" not in str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("liver_1frame.dcm", "segmentation"),
        ("rtdose.dcm", "RT dose"),
        ("rtstruct.dcm", "RT structure set"),
        ("waveform_ecg.dcm", "waveform"),
        ("reportsi.dcm", "structured report"),
        ("MR_truncated.dcm", "truncated"),
        ("JPGExtended.dcm", "dcmdjpeg"),
    ],
)
def test_what_is_no_image_says_what_it_is(name, words):
    with pytest.raises(InputError, match=words):
        open_study(get_testdata_file(name))


def test_further_refusals_are_sentences(tmp_path):
    slide = MadeSeries(attributes={"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6", "Modality": "SM"})
    mosaic = MadeSeries(modality="MR", attributes={"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]})
    bent = MadeSeries((1, 0, 0, 0.5, 1, 0))
    scout = MadeSeries(attributes={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    for name, series, words in (
        ("slide", slide, "whole-slide"),
        ("mosaic", mosaic, "mosaic"),
        ("bent", bent, "impossible orientation"),
        ("scout", scout, "localizers"),
    ):
        with pytest.raises(InputError, match=words):
            open_study(save(series.slice(0), tmp_path / name))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "Plantedname"):
        with pytest.raises(InputError) as error:
            open_study(path)
        assert "Planted" not in str(error.value)


def test_files_without_preamble_and_pictures_are_opened(tmp_path):
    series = MadeSeries()
    dataset = series.slice(1)
    data = save(dataset, tmp_path / "whole").read_bytes()
    length = int.from_bytes(data[140:144], "little")  # of the meta group, after the element that says it
    (tmp_path / "bare").write_bytes(data[144 + length :])
    np.testing.assert_array_equal(open_study(tmp_path / "bare").values[0], series.values[1])
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10)).save(tmp_path / "a.png")
    study = open_study(tmp_path / "a.png")
    assert study.values.shape == (1, 6, 10, 3) and study.geometry is None


def test_colour_and_film_come_as_viewers_show_them():
    film = open_study(get_testdata_file("examples_ybr_color.dcm"))
    assert film.values.shape == (30, 240, 320, 3) and film.values.dtype == np.uint8
    assert any("text in the pixels" in note for note in film.notes)
    palette = open_study(get_testdata_file("examples_palette.dcm"))
    dataset = pydicom.dcmread(get_testdata_file("examples_palette.dcm"))
    entry = int(dataset.pixel_array[100, 100])
    red = np.frombuffer(dataset.RedPaletteColorLookupTableData, "<u2")[entry] >> 8
    assert palette.values[0, 100, 100, 0] == red
    ybr = open_study(get_testdata_file("SC_ybr_full_422_uncompressed.dcm"))
    wanted = pydicom.dcmread(get_testdata_file("SC_ybr_full_422_uncompressed.dcm")).pixel_array
    np.testing.assert_array_equal(ybr.values[0], wanted)


@pytest.mark.parametrize("source", ["pydicom", "pydicom-data"])
def test_every_file_of_pydicom_is_opened_or_refused(source, capfd):
    if source == "pydicom":
        folder = Path(pydicom.__file__).parent / "data"
        files = [path for path in sorted(folder.rglob("*")) if path.suffix not in (".py", ".pyc", ".json")]
    else:
        pytest.importorskip("data_store")
        import data_store

        files = sorted((Path(data_store.__file__).parent).rglob("*.dcm"))
        # A film of two seconds and three colour spaces of the same picture are enough of their kind.
        files = [path for path in files if path.stat().st_size < 1_500_000]
    opened = 0
    for path in filter(Path.is_file, files):
        try:
            if len(list_series(path).series) > 1:
                continue
            study = open_study(path)
        except InputError as error:
            assert str(error).count("\n") == 0 and str(error).endswith("."), path
            assert str(path.parent) not in str(error)
        else:
            opened += 1
            assert study.values.ndim == (4 if study.is_colour else 3)
            assert not study.is_colour or study.values.dtype == np.uint8
    assert opened > 30


@pytest.mark.filterwarnings("always")
def test_nothing_of_the_patient_is_in_a_message(tmp_path, capfd, recwarn):
    folder = tmp_path / "Plantedname_A"
    series = MadeSeries()
    series.write(folder)
    broken = series.slice(0)
    broken.SOPInstanceUID = "Plantedtext"
    broken.PixelData = broken.PixelData[:50]
    save(broken, folder / "PLANTED-ID-77.dcm")
    other = MadeSeries(ORIENTATIONS["sagittal"], attributes={"SeriesDescription": "Plantedtext"})
    other.write(folder / "19040506")
    recwarn.clear()  # of what was made
    messages = []
    for wanted in (None, 1, 2, "nothing"):
        try:
            messages += open_study(folder, wanted).notes
        except InputError as error:
            messages.append(str(error))
    listing = list_series(folder)
    messages += [*listing.left_out, *(found.alias for found in listing.series)]
    messages += [note for found in listing.series for note in (*found.notes, found.refusal or "")]
    messages += [str(warning.message) for warning in recwarn]
    out, err = capfd.readouterr()
    for word in (*PLANTED, series.uid, series.study):
        assert word not in " ".join(messages) + out + err, word


def test_without_the_extra_one_sentence_names_it(tmp_path, monkeypatch):
    path = save(MadeSeries().slice(0), tmp_path / "x")
    study = open_study(path)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(
        InputError, match=r"needs highdicom; install it with `pip install 'unibiomed-jax\[dicom"
    ):
        write_study(study, {"liver": np.ones(study.values.shape, bool)}, tmp_path / "out", ["seg"])
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(
        InputError, match=r"needs pydicom; install it with `pip install 'unibiomed-jax\[dicom"
    ):
        open_study(path)
    Image.new("L", (4, 5)).save(tmp_path / "a.png")
    assert open_study(tmp_path / "a.png").values.shape == (1, 5, 4, 3)


def test_impossible_attributes_are_refused_and_leave_other_series_alone(tmp_path):
    """Values as broken exports have them, written past pydicom's checks."""
    good = MadeSeries().write(tmp_path / "in" / "good")
    wrong = {
        "ImagePositionPatient": ("DS", b"1\\2 "),
        "ImageOrientationPatient": ("DS", b"a\\b\\c\\d\\e\\f "),
        "PixelSpacing": ("DS", b"0\\0 "),
        "RescaleSlope": ("DS", b"one "),
        "WindowCenter": ("DS", b"left"),
        "BitsStored": ("US", b"\x00\x00"),
        "Rows": ("US", b"\x00\x00"),
        "SamplesPerPixel": ("US", b"\x07\x00"),
        "PhotometricInterpretation": ("CS", b"GREEN "),
        "SeriesInstanceUID": ("UI", b"Planted\x00"),
        "PixelPaddingValue": ("LO", b"none"),
        "NumberOfFrames": ("IS", b"many"),
        "SliceThickness": ("DS", b"thin"),
        "BodyPartExamined": ("CS", b"\xff\xfe"),
    }
    opened = set()
    for name, (vr, value) in wrong.items():
        dataset = MadeSeries().slice(0)
        dataset[name] = RawDataElement(Tag(name), vr, len(value), value, 0, False, True)
        path = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(dataset, path)
        try:
            study = open_study(path)
            opened.add(name)
            assert study.geometry is None or name not in ("ImagePositionPatient", "ImageOrientationPatient")
        except InputError as error:
            assert str(error).endswith(".") and "Planted" not in str(error) and "\n" not in str(error), name
        shutil.copy(path, tmp_path / "in" / name)
    # What scale and shape do not hang on may be wrong; without a place a slice is a picture.
    assert opened == {
        "ImagePositionPatient", "ImageOrientationPatient", "SeriesInstanceUID", "WindowCenter",
        "PixelPaddingValue", "SliceThickness", "BodyPartExamined",
    }  # fmt: skip
    found = [series for series in list_series(tmp_path / "in").series if series.shape[0] == 6]
    np.testing.assert_array_equal(open_study(tmp_path / "in", found[0].alias).values, open_study(good).values)


def test_phases_whose_images_all_differ_in_time_are_no_volumes_of_one_slice(tmp_path):
    """Every place three times, each image with a trigger time of its own, and nothing that numbers phases."""
    series = MadeSeries(shape=(4, 6, 5))
    for phase in range(3):
        for index in range(4):
            dataset = series.slice(index)
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPClassUID + f".{phase}.{index}"
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.TriggerTime = 100 * index + 10 * phase
            dataset.PixelData = (series.stored[index] + phase).tobytes()
            save(dataset, tmp_path / f"{phase}-{index}")
    with pytest.raises(InputError, match="two different images at one place"):
        open_study(tmp_path)


def test_an_impossible_number_of_rows_is_told_without_its_bytes(tmp_path):
    path = save(MadeSeries().slice(0), tmp_path / "a")
    content = path.read_bytes()
    rows = b"\x28\x00\x10\x00US\x02\x00"
    start = content.index(rows) + len(rows)
    longer = b"\x03\x00" + content[start : start + 2] + b"X"
    path.write_bytes(content[: start - 2] + longer + content[start + 2 :])
    with pytest.raises(InputError, match="cannot be understood|no readable DICOM") as error:
        open_study(path)
    assert "\\x" not in str(error.value)
