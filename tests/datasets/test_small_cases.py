"""Datasets at the edge: a volume with an axis too many, axes between two orders, a single patient."""

import itertools
import logging
import sys

import numpy as np
import pytest
from PIL import Image
from places import ROOT
from small_datasets import save_picture, save_square

from unibiomed_jax import cli
from unibiomed_jax.data.mixture import find_datasets, find_validation
from unibiomed_jax.datasets.build import BuildOptions, build
from unibiomed_jax.datasets.validate import ValidateOptions, validate
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.volumes import load_labelled, load_nifti
from unibiomed_jax.training.experiment import load_experiment

SHAPE = (20, 16, 6)


@pytest.fixture
def nibabel():
    return pytest.importorskip("nibabel")


def scan() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def labels() -> np.ndarray:
    values = np.zeros(SHAPE, np.uint8)
    values[2:8, 3:9, 1:3] = 1
    return values


# ------------------------------------------------------------------------------------------------------------
# Volumes


@pytest.mark.parametrize(
    ("of_volume", "of_labels"), [((1,), (1,)), ((1, 1), ()), ((), (1,)), ((), (1, 1, 1))]
)
def test_axes_of_one_after_the_third_are_dropped(tmp_path, nibabel, of_volume, of_labels):
    affine = np.diag([0.8, 0.8, 3, 1])
    for folder in ("ct", "seg"):
        (tmp_path / folder).mkdir()
    for values, axes, folder in ((scan(), of_volume, "ct"), (labels(), of_labels, "seg")):
        nibabel.save(
            nibabel.Nifti1Image(values.reshape(*SHAPE, *axes), affine), tmp_path / folder / "a.nii.gz"
        )
        nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / f"{folder}.nii.gz")
    found = load_labelled(tmp_path / "ct" / "a.nii.gz", tmp_path / "seg" / "a.nii.gz")
    expected = load_labelled(tmp_path / "ct.nii.gz", tmp_path / "seg.nii.gz")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    (tmp_path / "names.json").write_text('{"1": "liver"}')
    options = BuildOptions(
        tmp_path / "out", "CT", "abdomen", volumes=tmp_path / "ct", labels=tmp_path / "seg",
        label_names=tmp_path / "names.json",
    )  # fmt: skip
    assert build(options).targets == {"liver": 2}


@pytest.mark.parametrize("shape", [(20, 16, 3, 2), (20, 16, 6, 1, 2), (20, 16), (20,)])
def test_other_numbers_of_axes_are_refused(tmp_path, nibabel, shape):
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)
    with pytest.raises(InputError, match=rf"a\.nii\.gz has {len(shape)} axes; give one 3-D volume a file"):
        load_nifti(path)


def oblique(degrees: float) -> np.ndarray:
    """An affine turned about the head-to-feet axis."""
    angle = np.deg2rad(degrees)
    about = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about @ np.diag([0.8, 0.8, 3])
    affine[:3, 3] = 12, -30, 7
    return affine


@pytest.mark.parametrize("degrees", [45, 135, -45])
@pytest.mark.parametrize("apart", [1e-5, -1e-5, 1e-3, -1e-3])
def test_labels_of_an_oblique_scan_lie_as_the_scan_does(tmp_path, nibabel, degrees, apart):
    """At half a right angle two orders of axes are as near: the last digit decides, of each for itself."""
    nibabel.save(
        nibabel.Nifti1Image(labels().astype(np.int16), oblique(degrees + apart)), tmp_path / "v.nii.gz"
    )
    nibabel.save(nibabel.Nifti1Image(labels(), oblique(degrees - apart)), tmp_path / "l.nii.gz")
    voxels, values = load_labelled(tmp_path / "v.nii.gz", tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(voxels, values)
    assert values.sum() == labels().sum()
    turned = [load_nifti(tmp_path / name)[0].shape for name in ("v.nii.gz", "l.nii.gz")]
    assert set(turned) <= {(6, 16, 20), (6, 20, 16)}


def test_the_last_digit_decides_without_the_scan(tmp_path, nibabel):
    """Without which the test above would test nothing."""
    shapes = set()
    for apart in (1e-5, -1e-5):
        nibabel.save(nibabel.Nifti1Image(labels(), oblique(45 + apart)), tmp_path / "l.nii.gz")
        shapes.add(load_nifti(tmp_path / "l.nii.gz")[0].shape)
    assert len(shapes) == 2


@pytest.mark.parametrize("degrees", [0, 30, 45, 80])
def test_labels_stored_in_any_order_of_axes_lie_as_the_scan_does(tmp_path, nibabel, degrees):
    affine, volume = oblique(degrees), labels().astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "v.nii.gz")
    for order in itertools.permutations(range(3)):
        for mirrored in range(3):
            values, turned = labels().transpose(order), affine[:, [*order, 3]].copy()
            turned[:, 3] += turned[:, mirrored] * (values.shape[mirrored] - 1)
            turned[:, mirrored] *= -1
            file = nibabel.Nifti1Image(np.flip(values, mirrored), turned)
            nibabel.save(file, tmp_path / "l.nii.gz")
            np.testing.assert_array_equal(*load_labelled(tmp_path / "v.nii.gz", tmp_path / "l.nii.gz"))


def test_labels_elsewhere_are_still_refused(tmp_path, nibabel):
    nibabel.save(nibabel.Nifti1Image(scan(), oblique(45)), tmp_path / "v.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels(), oblique(47)), tmp_path / "l.nii.gz")
    with pytest.raises(InputError, match="lies elsewhere in space than"):
        load_labelled(tmp_path / "v.nii.gz", tmp_path / "l.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels()[:, :, :5], oblique(45)), tmp_path / "l.nii.gz")
    with pytest.raises(InputError, match="has the shape .* resample the labels"):
        load_labelled(tmp_path / "v.nii.gz", tmp_path / "l.nii.gz")


# ------------------------------------------------------------------------------------------------------------
# Few patients


def few(root, patients: int) -> BuildOptions:
    for number in range(patients):
        save_picture(root / "scans" / f"P{number}.png", seed=number)
        save_square(root / "masks" / f"P{number}_kidney.png")
    return BuildOptions(root / "out", "MRI", "abdomen", root / "scans", root / "masks")


@pytest.mark.parametrize(
    ("patients", "empty", "reason"),
    [
        (1, {"val", "test"}, "there is one patient, and a patient is never divided"),
        (2, {"test"}, "there are 2 patients, and a patient is never divided"),
        (3, set(), ""),
    ],
)
def test_splits_without_a_patient_are_named(tmp_path, patients, empty, reason):
    report = build(few(tmp_path, patients))
    found = {split for split in ("train", "val", "test") if report.annotations[split]}
    assert found == {"train", "val", "test"} - empty
    assert report.empty_splits == dict.fromkeys(empty, reason)


def test_splits_that_are_meant_to_be_empty_are_not_named(tmp_path):
    options = few(tmp_path, 2)
    assert build(BuildOptions(**{**vars(options), "fractions": (1, 0, 0)})).empty_splits == {}


def test_a_split_whose_masks_are_empty_is_named(tmp_path):
    options = few(tmp_path, 3)
    first = build(options)
    (held_out,) = (options.out / "val").glob("*.png")
    assert not first.empty_splits
    save_square(tmp_path / "masks" / f"{held_out.stem}_kidney.png", side=0)
    report = build(BuildOptions(**{**vars(options), "out": tmp_path / "again"}))
    assert report.empty_splits == {"val": "all masks of its patients are empty"}


def test_the_command_says_so(tmp_path, monkeypatch, capsys):
    options = few(tmp_path, 1)
    arguments = ["--out", options.out, "--modality", "MRI", "--site", "abdomen"]
    arguments += ["--images", options.images, "--masks", options.masks]
    monkeypatch.setattr(sys, "argv", ["unibiomed", "data", "build", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = capsys.readouterr().out
    reason = "is empty, because there is one patient, and a patient is never divided"
    assert not end.value.code
    assert f"Warning: val {reason}; training goes without validation." in output
    assert f"Warning: test {reason}." in output and "Warning: train" not in output


def test_training_goes_without_validation_where_there_is_none(tmp_path, caplog):
    options = few(tmp_path, 1)
    build(options)
    with caplog.at_level(logging.WARNING):
        assert find_validation(options.out, balance_to=0, repeats=1) == ()
    assert "Training goes without validation" in caplog.text and "no table for the split 'val'" in caplog.text
    with pytest.raises(InputError, match="no table for the split 'val'"):
        find_datasets(options.out, "val")
    for wrong in (tmp_path / "nowhere", options.out / "train.json"):
        with pytest.raises(InputError, match="The dataset folder"):
            find_validation(wrong)
    more = few(tmp_path / "more", 3)
    build(more)
    caplog.clear()
    found = find_validation(more.out, balance_to=0, repeats=1)
    assert found == find_datasets(more.out, "val", balance_to=0, repeats=1) and not caplog.text


@pytest.mark.parametrize("patients", [1, 3])
def test_the_finetuning_configuration_takes_few_patients(tmp_path, patients):
    options = few(tmp_path, patients)
    build(options)
    text = (ROOT / "configs" / "finetune.py").read_text()
    assert 'DATASET = "data/mine"' in text
    (tmp_path / "finetune.py").write_text(text.replace('"data/mine"', repr(str(options.out))))
    config = load_experiment(str(tmp_path / "finetune.py"))
    assert bool(config.validation) == (patients == 3) and config.data.datasets
    assert not validate(ValidateOptions(options.out)).errors
    assert Image.open(next((options.out / "train").glob("*.png"))).size == (60, 30)
