"""Masks come back at the millimetre they were drawn at, read by programs that are not ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unibiomed_jax import InputError, open_study, write_study

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
SimpleITK = pytest.importorskip("SimpleITK")
nibabel = pytest.importorskip("nibabel")

from dicom_series import MR, ORIENTATIONS, MadeSeries, save  # noqa: E402

# Slices, rows and columns of a box that is nowhere symmetric.
BOX = (slice(1, 3), slice(4, 9), slice(10, 13))
MIDDLE = (1.5, 6.0, 11.0)
# Shown inverted; signed values with a border that was not measured.
ODD_PIXELS = {
    "white_is_low": {"PhotometricInterpretation": "MONOCHROME1"},
    "padded": {"PixelPaddingValue": -2000},
}


def box(shape) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[BOX] = True
    return mask


def centre_of(series: MadeSeries) -> np.ndarray:
    """Where the middle of the box lies, from DICOM's equation."""
    return np.mean([series.point(index, *MIDDLE[1:]) for index in (1, 2)], axis=0)


def box_in(study, series: MadeSeries) -> np.ndarray:
    """The box on the study's own grid: its pixels found by where they lie."""
    mask = np.zeros(study.values.shape, bool)
    indices = np.argwhere(np.ones(study.values.shape))
    places = study.geometry.points(indices)
    rows, columns = np.array(series.cosines).reshape(2, 3)
    normal = np.cross(rows, columns)
    for index in np.arange(series.shape[0])[BOX[0]]:
        offset = places - series.origins[index]
        at = np.stack([offset @ columns / series.spacing[1], offset @ rows / series.spacing[2]], axis=1)
        inside = np.abs(offset @ normal) < 0.01
        for axis, part in enumerate(BOX[1:]):
            inside &= (at[:, axis] > part.start - 0.01) & (at[:, axis] < part.stop - 1 + 0.01)
        mask[tuple(indices[inside].T)] = True
    return mask


@pytest.fixture(scope="module", params=[*ORIENTATIONS, "enhanced", "tilted", *ODD_PIXELS])
def written(request, tmp_path_factory):
    """A series, the study read from it, and the folder of all forms of its box."""
    kind, tmp_path = request.param, tmp_path_factory.mktemp(request.param)
    series = MadeSeries(
        ORIENTATIONS.get(kind, ORIENTATIONS["axial"]),
        tilt=0.3 if kind == "tilted" else 0.0,
        attributes=ODD_PIXELS.get(kind, {}),
    )
    if kind == "padded":
        series.stored[:, :2] = -2000
    folder = tmp_path / "in"
    if kind == "enhanced":
        save(series.enhanced(), folder / "file")
    else:
        series.write(folder)
    study = open_study(folder)
    mask = box_in(study, series)
    assert mask.sum() == box(series.shape).sum()
    formats = ("nifti", "seg", "labelmap", "rtstruct")
    write_study(study, {"liver": mask, "spleen": np.zeros_like(mask)}, tmp_path / "out", formats)
    return kind, series, study, mask, tmp_path / "out"


def test_a_mask_lies_where_it_was_drawn(written):
    kind, series, study, mask, out = written
    wanted = centre_of(series)
    # Values: every pixel of the study is the one stored at its place.
    number = np.argmin(np.linalg.norm(study.geometry.origins - series.origins[2], axis=1))
    np.testing.assert_array_equal(study.values[number], series.values[2])
    assert np.abs(study.geometry.origins - series.origins[:: 1 if number == 2 else -1]).max() < 1e-4

    # NIfTI, by nibabel and by SimpleITK.
    (file,) = (path for path in out.glob("*liver.nii.gz"))
    image = nibabel.load(file)
    voxels = np.argwhere(np.asarray(image.dataobj))
    ras = (image.affine @ np.append(voxels.mean(0), 1))[:3]
    np.testing.assert_allclose(ras * (-1, -1, 1), wanted, atol=0.01)
    assert image.get_data_dtype() == np.uint8 and image.header["sform_code"] == 1
    if kind == "tilted":  # no reader may take it for straight
        assert image.header["qform_code"] == 0
        with pytest.raises(RuntimeError):
            SimpleITK.ReadImage(str(file))
    else:
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        read = SimpleITK.ReadImage(str(file))
        indices = np.argwhere(SimpleITK.GetArrayFromImage(read))[:, ::-1].mean(0)
        np.testing.assert_allclose(
            read.TransformContinuousIndexToPhysicalPoint(indices.tolist()), wanted, atol=0.01
        )

    # DICOM-SEG, each frame at the place of the image it names.
    for name in ("seg", "labelmap"):
        segmentation = pydicom.dcmread(out / f"{name}.dcm")
        assert len(segmentation.SegmentSequence) == (
            1 if name == "seg" else 2
        )  # a label map has a background
        frames = segmentation.pixel_array.reshape(-1, *study.values.shape[1:])
        points = []
        shared = segmentation.SharedFunctionalGroupsSequence[0]
        rows, columns = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(
            2, 3
        )
        spacing = [float(value) for value in shared.PixelMeasuresSequence[0].PixelSpacing]
        for frame, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
            origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
            for row, column in np.argwhere(frame):
                points.append(origin + rows * spacing[1] * column + columns * spacing[0] * row)
            _check_derivation(groups, study, origin)
        assert len(points) == mask.sum()
        np.testing.assert_allclose(np.mean(points, axis=0), wanted, atol=0.01)
        references = segmentation.ReferencedSeriesSequence  # without it OHIF shows nothing
        assert references[0].SeriesInstanceUID == series.uid
        assert segmentation.FrameOfReferenceUID == series.frame_of_reference
        if kind != "tilted":
            assert float(shared.PixelMeasuresSequence[0].SpacingBetweenSlices) == pytest.approx(2.5)

    # RTSTRUCT: outlines about the box, half a pixel outside its pixels' centres.
    structures = pydicom.dcmread(out / "rtstruct.dcm")
    (contours,) = structures.ROIContourSequence
    assert len(contours.ContourSequence) == 2 and len(structures.StructureSetROISequence) == 1
    corners = {(row, column) for row in (3.5, 8.5) for column in (9.5, 12.5)}
    by_image = {str(frame.file.header.SOPInstanceUID): frame.file.header for frame in study.source.frames}
    for contour in contours.ContourSequence:
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        index = min(range(6), key=lambda i: abs((points[0] - series.origins[i]) @ np.cross(*_axes(series))))
        expected = [series.point(index, *corner) for corner in corners]
        assert len(points) == 4
        for point in points:
            assert min(np.linalg.norm(point - corner) for corner in expected) < 0.01
        reference = contour.ContourImageSequence[0]
        header = by_image[str(reference.ReferencedSOPInstanceUID)]
        if kind == "enhanced":
            groups = header.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
            place = groups.PlanePositionSequence[0].ImagePositionPatient
        else:
            place = header.ImagePositionPatient
        np.testing.assert_allclose(np.array(place, float), series.origins[index], atol=1e-4)


def _axes(series: MadeSeries) -> np.ndarray:
    return np.array(series.cosines).reshape(2, 3)


def _check_derivation(groups, study, origin) -> None:
    """The image that a frame was derived from lies at the frame's place."""
    source = groups.DerivationImageSequence[0].SourceImageSequence[0]
    for frame in study.source.frames:
        named = frame.file.header.SOPInstanceUID == source.ReferencedSOPInstanceUID
        if named and source.get("ReferencedFrameNumber", 1) == frame.number + 1:
            np.testing.assert_allclose(frame.origin, origin, atol=1e-4)
            return
    raise AssertionError("a frame names an image that is not in the study")


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
def test_the_objects_satisfy_dciodvfy(written):
    *_, out = written
    for name in ("seg", "rtstruct"):
        run = subprocess.run(["dciodvfy", str(out / f"{name}.dcm")], capture_output=True, text=True)
        found = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")]
        assert run.returncode == 0 and not found, found


_DCMQI = shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(_DCMQI is None, reason="dcmqi is not installed")
def test_slicers_reader_finds_the_mask_at_its_place(written, tmp_path):
    kind, series, _, mask, out = written
    if kind == "tilted":
        pytest.skip("dcmqi makes a straight volume of every segmentation")
    run = [_DCMQI, "--inputDICOM", str(out / "seg.dcm"), "--outputDirectory", str(tmp_path), "-t", "nrrd"]
    subprocess.run(run, check=True, capture_output=True)
    image = SimpleITK.ReadImage(str(tmp_path / "1.nrrd"))
    voxels = np.argwhere(SimpleITK.GetArrayFromImage(image))[:, ::-1]
    assert len(voxels) == mask.sum()
    place = image.TransformContinuousIndexToPhysicalPoint(voxels.mean(0).tolist())
    np.testing.assert_allclose(place, centre_of(series), atol=0.01)


def test_missing_slices_are_named_and_refused_by_nifti_alone(tmp_path):
    series = MadeSeries()
    study = open_study(series.write(tmp_path / "in", skip=(3,)))
    assert any(
        "5.00 mm instead of 2.50 mm after slice 3 (position -135.00 mm)" in note for note in study.notes
    )
    mask = np.zeros(study.values.shape, bool)
    mask[3, 4, 5] = True
    with pytest.raises(InputError, match="uneven: 5.00 mm instead of 2.50"):
        write_study(study, {"liver": mask}, tmp_path / "out", ["nifti"])
    assert not (tmp_path / "out").exists()
    write_study(study, {"liver": mask}, tmp_path / "out", ["seg", "rtstruct"])
    (groups,) = pydicom.dcmread(tmp_path / "out" / "seg.dcm").PerFrameFunctionalGroupsSequence
    place = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
    np.testing.assert_allclose(place, series.origins[4], atol=1e-4)


def test_one_stack_of_an_object_with_several_keeps_its_frames(tmp_path):
    series = MadeSeries()
    path = save(series.enhanced(times=2), tmp_path / "in")
    with pytest.raises(InputError, match="2 series: 1: series-"):
        open_study(path)
    study = open_study(path, series=2)
    assert "time point 2 of 2" in study.notes
    mask = box(series.shape)
    write_study(study, {"liver": mask}, tmp_path / "out", ["seg"])
    segmentation = pydicom.dcmread(tmp_path / "out" / "seg.dcm")
    for groups in segmentation.PerFrameFunctionalGroupsSequence:
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedFrameNumber > 6  # of the second time point


def test_nifti_keeps_grid_and_orientation_to_the_bit(tmp_path):
    """All 48 orders and directions of the axes: one box in the patient, and the input's own header."""
    values = np.zeros((5, 8, 11), np.int16)
    values[1:3, 2:6, 4:9] = 700
    values[0] = -900
    turn = np.deg2rad(83)  # oblique as far as it goes
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    for number, axes in enumerate(np.ndindex(3, 3, 3)):
        if len(set(axes)) < 3:
            continue
        for signs in np.ndindex(2, 2, 2):
            affine = np.eye(4)
            affine[:3, :3] = rotation @ np.diag([3.0, 0.9, 0.7])
            affine[:3, 3] = (7.5, -20.25, 100.125)
            image = nibabel.Nifti1Image(values, affine)
            orders = np.array([[axis, -1 if sign else 1] for axis, sign in zip(axes, signs, strict=True)])
            image = image.as_reoriented(orders)
            image.set_sform(image.affine, 2)
            image.set_qform(image.affine, 1)
            image.header["descrip"] = b"Plantedname"
            path = tmp_path / f"{number}{signs}.nii"
            nibabel.save(image, path)
            study = open_study(path)
            assert study.geometry.spacing == pytest.approx((3.0, 0.9, 0.7)) or study.geometry.spacing == (
                pytest.approx((3.0, 0.7, 0.9))
            )
            mask = study.values == 700
            wanted = (affine @ (1.5, 3.5, 6.0, 1))[:3]
            place = study.geometry.points(np.argwhere(mask)).mean(0)
            np.testing.assert_allclose(place * (-1, -1, 1), wanted, atol=1e-3)
            if all(signs) or not any(signs):
                write_study(study, {"liver": mask}, tmp_path / f"{number}{signs}", ["nifti"])
                back = nibabel.load(tmp_path / f"{number}{signs}" / "mask_1_liver.nii.gz")
                stored = nibabel.load(path)
                np.testing.assert_array_equal(np.asarray(back.dataobj), image.get_fdata() == 700)
                for field in (
                    "sform_code",
                    "qform_code",
                    "srow_x",
                    "srow_y",
                    "srow_z",
                    "quatern_b",
                    "qoffset_x",
                ):
                    np.testing.assert_array_equal(back.header[field], stored.header[field])
                np.testing.assert_array_equal(back.affine, stored.affine)
                assert back.header["descrip"].item() == b"" and back.header["sform_code"] == 2


def test_shapes_that_only_touch_and_holes_have_outlines_of_their_own():
    from unibiomed_jax.outputs.outlines import trace

    mask = np.zeros((7, 8), bool)
    mask[1:6, 1:6] = True
    mask[3, 3] = False  # a hole
    mask[6, 6] = True  # touches at a corner
    outlines = trace(mask)
    assert len(outlines) == 3

    def area(points):
        rows, columns = points.T
        return 0.5 * np.sum(columns * np.roll(rows, -1) - np.roll(columns, -1) * rows)

    assert sorted(area(points) for points in outlines) == [-1.0, 1.0, 25.0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((9, 9)) < 0.5
        outlines = trace(mask)
        assert sum(area(points) for points in outlines) == mask.sum()
        for points in outlines:  # no corner twice, and each of them turns
            assert len({tuple(point) for point in points}) == len(points)
            along = np.diff(points, axis=0, append=points[:1]) != 0
            assert (along.sum(1) == 1).all() and (along[:, 0] != np.roll(along[:, 0], 1)).all()


def test_label_maps_refuse_what_they_cannot_hold(tmp_path):
    study = open_study(MadeSeries(modality="MR", attributes={"SOPClassUID": MR}).write(tmp_path / "in"))
    mask = box(study.values.shape)
    with pytest.raises(InputError, match="overlap"):
        write_study(study, {"liver": mask, "liver tumor": mask}, tmp_path / "out", ["labelmap"])
    write_study(study, {"liver": mask, "liver tumor": mask}, tmp_path / "out", ["seg"])
    read = highdicom.seg.segread(tmp_path / "out" / "seg.dcm")
    assert read.number_of_segments == 2


def test_an_answer_without_any_mask_writes_no_segmentation(tmp_path):
    study = open_study(MadeSeries().write(tmp_path / "in"))
    write_study(study, {"liver": np.zeros(study.values.shape, bool)}, tmp_path / "out", ["seg", "rtstruct"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["study.json"]


def test_masks_of_another_grid_and_nifti_as_segmentation_are_refused(tmp_path):
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(np.full((4, 5, 6), -900, np.int16), np.eye(4)), path)
    study = open_study(path)
    mask = np.zeros(study.values.shape, bool)
    mask[0, 0, 0] = True
    with pytest.raises(InputError, match="refers to a DICOM series"):
        write_study(study, {"liver": mask}, tmp_path / "out", ["seg"])
    with pytest.raises(InputError, match="shape"):
        write_study(study, {"liver": mask[:2]}, tmp_path / "out")


def test_a_film_without_places_is_refused_by_what_states_places(tmp_path):
    from pydicom.data import get_testdata_file

    film = open_study(get_testdata_file("examples_ybr_color.dcm"))
    mask = np.ones(film.values.shape[:3], bool)
    for name, words in (("seg", "film"), ("nifti", "no known place"), ("rtstruct", "RTSTRUCT describes")):
        with pytest.raises(InputError, match=words):
            write_study(film, {"heart": mask}, tmp_path / "out", [name])


def test_eight_hundred_slices_in_one_object_are_read_and_written(tmp_path):
    series = MadeSeries(shape=(800, 16, 16), spacing=(0.5, 0.9, 0.7))
    study = open_study(save(series.enhanced(), tmp_path / "in"))
    np.testing.assert_array_equal(study.values, series.values)
    mask = np.zeros(study.values.shape, bool)
    mask[100:700, 4:9, 10:13] = True
    write_study(study, {"liver": mask}, tmp_path / "out", ["nifti", "seg", "rtstruct"])
    assert pydicom.dcmread(tmp_path / "out" / "seg.dcm").NumberOfFrames == 600
    np.testing.assert_array_equal(
        np.asarray(nibabel.load(tmp_path / "out" / "mask_1_liver.nii.gz").dataobj), mask.transpose(2, 1, 0)
    )
