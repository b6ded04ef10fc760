"""NIfTI, NRRD and MetaImage: at their place, or refused with a sentence."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from unibiomed_jax import InputError, open_study, write_study
from unibiomed_jax.studies.opening import list_series

nibabel = pytest.importorskip("nibabel")

AFFINE = np.array([[-0.8, 0, 0, 40.5], [0, 0.9, 0, -30.25], [0, 0, 3.0, 12.0], [0, 0, 0, 1.0]])


def make(path: Path, values=None, affine=AFFINE) -> Path:
    values = np.arange(-900, -900 + 4 * 5 * 6, dtype=np.int16).reshape(6, 5, 4) if values is None else values
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def test_slices_follow_the_axis_of_the_largest_spacing(tmp_path):
    values = np.arange(-900, -900 + 120, dtype=np.int16).reshape(6, 5, 4)
    study = open_study(make(tmp_path / "a.nii.gz", values))
    assert study.values.shape == (4, 5, 6) and study.geometry.plane == "axial"
    np.testing.assert_allclose(study.geometry.spacing, (3.0, 0.9, 0.8), atol=1e-6)
    for voxel in ((0, 0, 0), (5, 4, 3), (2, 3, 1)):
        place = (AFFINE @ (*voxel, 1))[:3] * (-1, -1, 1)
        apart = np.linalg.norm(study.geometry.points(np.argwhere(study.values == values[voxel]))[0] - place)
        assert apart < 1e-4
    # A sagittal series, stored with its slices on the first axis, is not cut across.
    sagittal = open_study(make(tmp_path / "b.nii", affine=np.diag([4.0, 0.6, 0.6, 1.0])))
    assert sagittal.geometry.plane == "sagittal" and len(sagittal.values) == 6
    # Where no spacing stands out, slices are axial.
    assert (
        open_study(make(tmp_path / "c.nii", affine=np.diag([1.1, 1.0, 1.0, 1.0]))).geometry.plane == "axial"
    )


def test_what_is_odd_is_said_and_what_is_impossible_refused(tmp_path):
    no_codes = open_study(make(tmp_path / "a.nii", affine=None))
    assert any("left and right are unknown" in note for note in no_codes.notes)
    image = nibabel.load(make(tmp_path / "b.nii"))
    moved = AFFINE.copy()
    moved[0, 3] += 5
    image.set_qform(moved, 1)
    nibabel.save(image, tmp_path / "b2.nii")
    differing = open_study(tmp_path / "b2.nii")
    assert any("differ by 5 mm" in note for note in differing.notes)
    np.testing.assert_allclose(differing.geometry.origins[-1], AFFINE[:3, 3] * (-1, -1, 1), atol=1e-5)
    image = nibabel.load(make(tmp_path / "m.nii", affine=AFFINE * 0.001))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "m2.nii")
    np.testing.assert_allclose(open_study(tmp_path / "m2.nii").geometry.spacing, (3.0, 0.9, 0.8), atol=1e-5)
    nan = np.full((4, 4, 4), -700, np.float32)
    nan[0, 0, 0] = np.nan
    holed = open_study(make(tmp_path / "n.nii", nan))
    assert holed.padding.sum() == 1 and np.isfinite(holed.values).all()
    # What a file does not say is stated, not guessed.
    path = make(tmp_path / "p.nii", np.full((4, 4, 4), 900, np.int16))
    assert open_study(path).modality == "unknown" and open_study(path).unit == ""
    stated = open_study(path, modality="CT")
    assert stated.modality == "CT" and stated.unit == "HU" and "may not be HU" in stated.notes[-1]
    assert open_study(make(tmp_path / "q.nii"), modality="CT").notes == ()

    data = bytearray(make(tmp_path / "s.nii").read_bytes())
    data[296:312] = bytes(16)  # the second row of the sform
    (tmp_path / "s.nii").write_bytes(data)
    with pytest.raises(InputError, match="singular"):
        open_study(tmp_path / "s.nii")
    with pytest.raises(InputError, match="colours or complex"):
        open_study(make(tmp_path / "z.nii", np.zeros((4, 4, 4), np.complex64)))
    with pytest.raises(InputError, match="three axes"):
        open_study(make(tmp_path / "5.nii", np.zeros((4, 4, 4, 1, 3), np.int16)))
    shutil.copy(make(tmp_path / "g.nii.gz"), tmp_path / "g.nii")
    with pytest.raises(InputError, match=r"name it \.nii\.gz"):
        open_study(tmp_path / "g.nii")
    (tmp_path / "t.nii.gz").write_bytes((tmp_path / "g.nii.gz").read_bytes()[:-40])
    with pytest.raises(InputError, match="copy it again"):
        open_study(tmp_path / "t.nii.gz")
    (tmp_path / "u.nii.gz").write_bytes(gzip.compress(b"not a volume"))
    with pytest.raises(InputError, match="copy it again"):
        open_study(tmp_path / "u.nii.gz")


def test_time_points_are_series_to_choose_from_and_single_ones_are_not(tmp_path):
    values = np.arange(-900, -900 + 4 * 4 * 5 * 3, dtype=np.int16).reshape(4, 4, 5, 3)
    path = make(tmp_path / "a.nii", values)
    with pytest.raises(InputError, match="There are 3 series"):
        open_study(path)
    study = open_study(path, 2)
    assert set(study.values.ravel()) == set(values[..., 1].ravel())
    write_study(study, {"liver": study.values == values[1, 2, 3, 1]}, tmp_path / "out", ["nifti"])
    mask = np.asarray(nibabel.load(tmp_path / "out" / "mask_1_liver.nii.gz").dataobj)
    assert np.argwhere(mask).tolist() == [[1, 2, 3]]
    single = open_study(make(tmp_path / "b.nii", values[..., :1]))
    write_study(single, {"liver": single.values == values[1, 2, 3, 0]}, tmp_path / "one", ["nifti"])
    assert nibabel.load(tmp_path / "one" / "mask_1_liver.nii.gz").shape == (4, 4, 5, 1)
    flat = open_study(make(tmp_path / "c.nii", values[..., 0, 0]))
    assert flat.values.shape == (1, 4, 4)


def test_nrrd_and_metaimage_lie_where_simpleitk_puts_them(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    values = np.arange(-900, -900 + 120, dtype=np.int16).reshape(4, 5, 6)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((0.8, 0.9, 3.0))
    image.SetOrigin((-10.5, 20.25, 30.0))
    image.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))
    for suffix in ("nrrd", "mha"):
        path = tmp_path / f"a.{suffix}"
        sitk.WriteImage(image, str(path))
        study = open_study(path)
        for voxel in ((0, 0, 0), (3, 4, 5), (1, 2, 3)):
            wanted = image.TransformIndexToPhysicalPoint(voxel[::-1])
            at = np.argwhere(study.values == values[voxel])
            np.testing.assert_allclose(study.geometry.points(at)[0], wanted, atol=1e-6)
        mask = study.values == values[1, 2, 3]
        write_study(study, {"liver": mask}, tmp_path / f"out_{suffix}", ["nifti"])
        read = sitk.ReadImage(str(tmp_path / f"out_{suffix}" / "mask_1_liver.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read), values == values[1, 2, 3])
        np.testing.assert_allclose(read.GetOrigin(), image.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(read.GetDirection(), image.GetDirection(), atol=1e-5)


def test_a_real_oblique_volume_and_films_of_nibabel():
    folder = Path(nibabel.__file__).parent / "tests" / "data"
    if not (folder / "functional.nii").exists():
        pytest.skip("nibabel was installed without its test data")
    assert len(list_series(folder / "functional.nii").series) == 20
    with pytest.raises(InputError, match="no volume"):
        open_study(folder / "row_major.dconn.nii")
    study = open_study(folder / "anatomical.nii", None)
    image = nibabel.load(folder / "anatomical.nii")
    voxel = np.array(np.unravel_index(np.argmax(image.get_fdata()), image.shape))
    place = (image.affine @ (*voxel, 1))[:3] * (-1, -1, 1)
    found = study.geometry.points(np.argwhere(study.values == study.values.max()))
    assert np.linalg.norm(found - place, axis=1).min() < 0.01


def test_volumes_are_told_apart_by_numbers_in_the_order_of_their_names(tmp_path):
    for number in (10, 2, 1):
        make(tmp_path / f"{number}.nii", np.full((4, 3, 2), number, np.int16))
    found = list_series(tmp_path).series
    assert [series.alias for series in found] == ["series-1", "series-2", "series-3"]
    studies = [open_study(tmp_path, f"series-{number}") for number in (1, 2, 3)]
    assert [study.values.max() for study in studies] == [1, 2, 10]
    assert [study.study_alias for study in studies] == ["study-1", "study-2", "study-3"]


def test_a_grid_whose_rows_and_columns_are_not_perpendicular_is_refused(tmp_path):
    import SimpleITK

    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    affine[0, 1] = 0.1
    make(tmp_path / "a.nii", affine=affine)
    image = SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
    direction = np.eye(3)
    direction[0, 1] = 0.1
    image.SetDirection(direction.ravel().tolist())
    SimpleITK.WriteImage(image, tmp_path / "b.nrrd")
    for path in (tmp_path / "a.nii", tmp_path / "b.nrrd"):
        (series,) = list_series(path).series
        assert series.refusal
        with pytest.raises(InputError, match="not perpendicular; resample it"):
            open_study(path)


@pytest.mark.parametrize("modality", ["ct", "MRI", "PET"])
def test_a_modality_that_is_none_is_refused(tmp_path, modality):
    with pytest.raises(InputError, match=f"'{modality}' is no modality.*CT.*MR.*PT"):
        open_study(make(tmp_path / "a.nii"), modality=modality)


def test_an_unknown_unit_of_time_is_no_matter(tmp_path):
    image = nibabel.load(make(tmp_path / "a.nii"))
    image.header["xyzt_units"] = 68
    nibabel.save(image, tmp_path / "b.nii")
    assert [series.refusal for series in list_series(tmp_path / "b.nii").series] == [None]
