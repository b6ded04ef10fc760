"""What `data build` makes of the files that people have: nothing is lost in silence, nonsense is refused."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image
from small_datasets import save_picture, save_square

from unibiomed_jax.datasets.build import BuildOptions, build
from unibiomed_jax.datasets.validate import ValidateOptions, validate
from unibiomed_jax.errors import DiskFullError, InputError


@pytest.fixture
def images(tmp_path):
    """Two images with a mask each."""
    for stem in ("P0", "P1"):
        save_picture(tmp_path / "scans" / f"{stem}.png")
        save_square(tmp_path / "masks" / f"{stem}_kidney.png")
    options = BuildOptions(tmp_path / "out", "MRI", "abdomen", fractions=(1, 0, 0))
    return replace(options, images=tmp_path / "scans", masks=tmp_path / "masks")


@pytest.fixture
def volumes(tmp_path):
    """One scan with a label of value 1."""
    pytest.importorskip("nibabel")
    save_volume(tmp_path / "ct" / "a.nii.gz", scan())
    save_volume(tmp_path / "seg" / "a.nii.gz", labels())
    options = BuildOptions(tmp_path / "out", "CT", "abdomen", fractions=(1, 0, 0))
    name(tmp_path, {"1": "liver"})
    return replace(
        options, volumes=tmp_path / "ct", labels=tmp_path / "seg", label_names=tmp_path / "names.json"
    )


def scan(shape=(20, 16, 6)):
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def labels(shape=(20, 16, 6)):
    values = np.zeros(shape, np.uint8)
    values[2:8, 3:9, 1:4] = 1
    return values


def save_volume(path, values, affine=None):
    import nibabel

    path.parent.mkdir(exist_ok=True)
    if affine is None:
        affine = np.diag([0.8, 0.8, 3, 1])
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def name(folder, names):
    (folder / "names.json").write_text(json.dumps(names))


def written(options, target):
    """Pixels of a target by slice."""
    found = sorted(options.out.rglob(f"*_{target}.png"))
    return {path.stem: int(np.asarray(Image.open(path)).sum()) for path in found}


def refused(options, message):
    with pytest.raises(InputError, match=message) as error:
        build(options)
    assert "\n" not in str(error.value) and not options.out.exists()
    assert not list(options.out.parent.glob(".out*"))
    return error


# ------------------------------------------------------------------------------------------------------------
# Names


def test_values_of_one_name_are_one_target(volumes, tmp_path):
    values = labels()
    values[10:15, 3:9, 2:5] = 2
    save_volume(tmp_path / "seg" / "a.nii.gz", values)
    name(tmp_path, {"1": "kidney", "2": "kidney", "3": "kidney"})
    assert build(volumes).targets == {"kidney": 4}
    assert written(volumes, "kidney") == {
        "a-001_kidney": 36, "a-002_kidney": 66, "a-003_kidney": 66, "a-004_kidney": 30
    }  # fmt: skip
    assert not validate(ValidateOptions(volumes.out)).problems


@pytest.mark.parametrize("wrong", [None, "", "  ", "liver/left", "liver\\left", 5, ["liver"]])
def test_names_that_are_no_words(volumes, tmp_path, wrong):
    name(tmp_path, {"1": "liver", "2": wrong})
    refused(volumes, r"names\.json names the label 2 .*; give it a name in words")


def test_a_mask_without_a_target(images, tmp_path):
    save_square(tmp_path / "masks" / "P0_.png")
    refused(images, r"P0_\.png names no target; name it <image stem>_<target>\.png")


@pytest.mark.parametrize("stem", ["train", "test_mask", "mask"])
def test_volumes_that_readers_would_take_for_something_else(volumes, tmp_path, stem):
    for folder in ("ct", "seg"):
        (tmp_path / folder / "a.nii.gz").rename(tmp_path / folder / f"{stem}.nii.gz")
    refused(volumes, rf"ct/{stem}\.nii\.gz has a name that datasets keep for other folders; rename it")


def test_slices_sort_by_name(volumes, tmp_path):
    for folder, values in (("ct", scan((4, 4, 1002))), ("seg", np.ones((4, 4, 1002), np.uint8))):
        save_volume(tmp_path / folder / "a.nii.gz", values)
    build(volumes)
    slices = json.loads((volumes.out / "meta_train.json").read_text())["volumes"]["a"]["slices"]
    assert slices == sorted(slices) and slices[0] == "a-0000.png" and slices[-1] == "a-1001.png"


# ------------------------------------------------------------------------------------------------------------
# Labels and their scan


@pytest.mark.parametrize(
    "affine",
    [np.diag([0.8, 0.8, 3.1, 1]), np.diag([-0.8, 0.8, 3, 1]), np.diag([0.8, 0.8, 3, 1]) + np.eye(4, k=3)],
    ids=["voxel size", "mirrored", "origin"],
)
def test_labels_elsewhere_in_space(volumes, tmp_path, affine):
    save_volume(tmp_path / "seg" / "a.nii.gz", labels(), affine)
    refused(volumes, r"seg/a\.nii\.gz lies elsewhere .*ct/a\.nii\.gz, .* mm; resample the labels to the volu")


def test_labels_in_another_order_of_axes_at_the_same_place(volumes, tmp_path):
    """Turned, mirrored, and rounded as headers are: the same voxels."""
    build(volumes)
    affine = np.diag([0.8, 0.8, 3, 1])[:, [2, 0, 1, 3]]
    affine[:, 3] += affine[:, 0] * 5
    affine[:, 0] *= -1
    turned = labels().transpose(2, 0, 1)[::-1]
    save_volume(tmp_path / "seg" / "a.nii.gz", turned, affine + 1e-4 * np.eye(4, k=3))
    other = replace(volumes, out=tmp_path / "other")
    build(other)
    for path in volumes.out.rglob("*.png"):
        assert path.read_bytes() == (other.out / path.relative_to(volumes.out)).read_bytes()


def test_labels_of_another_shape_and_without_a_scan(volumes, tmp_path):
    save_volume(tmp_path / "seg" / "b.nii.gz", labels())
    refused(volumes, r"seg/b\.nii\.gz has no volume of its name in .*ct; add or remove it")
    save_volume(tmp_path / "ct" / "b.nii.gz", scan((20, 16, 5)))
    refused(volumes, r"seg/b\.nii\.gz has the shape \(6, 16, 20\) but .*ct/b\.nii\.gz \(5, 16, 20\)")


def test_labels_as_floats_and_of_one_pixel(volumes, tmp_path):
    values = labels() * np.float32(1.00001)
    values[0, 0, 5] = 0.9999
    values[0, 0, 0] = np.nan
    save_volume(tmp_path / "seg" / "a.nii.gz", values)
    build(volumes)
    assert written(volumes, "liver") == {
        "a-001_liver": 36, "a-002_liver": 36, "a-003_liver": 36, "a-005_liver": 1
    }  # fmt: skip


def test_volumes_without_a_named_label_are_listed(volumes, tmp_path):
    save_volume(tmp_path / "ct" / "b.nii.gz", scan())
    save_volume(tmp_path / "seg" / "b.nii.gz", labels() * 7)
    report = build(volumes)
    assert report.without_masks == [tmp_path / "ct" / "b.nii.gz"]
    assert report.images["train"] == report.patients["train"] == 1
    assert list(json.loads((volumes.out / "meta_train.json").read_text())["volumes"]) == ["a"]
    assert not (volumes.out / "b").exists()


def test_what_was_not_read_is_listed(images, volumes, tmp_path):
    for path in ("scans/P2.gif", "scans/more/P3.png", "scans/._P0.png", "masks/P0_cyst.dcm",
                 "masks/.DS_Store", "ct/a.nrrd", "seg/slicer.json", "seg/.hidden.nii"):  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    expected = [tmp_path / path for path in ("scans/P2.gif", "scans/more", "masks/P0_cyst.dcm")]
    assert build(images).not_read == expected
    # What was read at another time is none of it.
    seg = tmp_path / "ct" / "seg"
    (tmp_path / "seg").rename(seg)
    (tmp_path / "names.json").rename(seg / "names.json")
    volumes = replace(volumes, out=tmp_path / "3d", labels=seg, label_names=seg / "names.json")
    assert build(volumes).not_read == [tmp_path / "ct" / "a.nrrd", seg / "slicer.json"]


# ------------------------------------------------------------------------------------------------------------
# Masks


def test_masks_in_any_channel_and_upright(images, tmp_path):
    colour = np.zeros((30, 60, 3), np.uint8)
    colour[4:16, 5:17, 1] = 255
    Image.fromarray(colour).save(tmp_path / "masks" / "P0_kidney.png")
    square, exif = np.zeros((30, 60), np.uint8), Image.Exif()
    square[4:16, 5:17] = 255
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(square)).save(tmp_path / "masks" / "P1_kidney.jpg", exif=exif, quality=95)
    (tmp_path / "masks" / "P1_kidney.png").unlink()
    build(images)
    for path in images.out.rglob("*_kidney.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), square > 0)


def test_masks_of_many_pages_and_empty_ones(images, tmp_path):
    page = Image.new("L", (60, 30), 255)
    page.save(tmp_path / "masks" / "P0_cyst.tif", save_all=True, append_images=[page])
    refused(images, r"P0_cyst\.tif holds 2 frames")
    (tmp_path / "masks" / "P0_cyst.tif").unlink()
    save_square(tmp_path / "masks" / "P0_cyst.png", side=1)
    save_square(tmp_path / "masks" / "P0_scar.png", side=0)
    # Specks as JPEG leaves them are no mask.
    Image.new("L", (60, 30), 9).save(tmp_path / "masks" / "P0_stone.jpg")
    save_square(tmp_path / "masks" / "P1_kidney.png", side=0)
    report = build(replace(images, long_side=20))
    empty = ["P0_cyst.png", "P0_scar.png", "P0_stone.jpg", "P1_kidney.png"]
    assert [path.name for path in report.empty_masks] == empty
    assert list(images.out.rglob("P0*.png")) and not list(images.out.rglob("P1*"))
    assert set(report.targets) == {"kidney"}
    for path in (tmp_path / "masks").glob("*_kidney.png"):
        save_square(path, side=0)
    refused(
        replace(images, out=tmp_path / "again", long_side=20), "All masks in .*masks are empty; draw them"
    )


# ------------------------------------------------------------------------------------------------------------
# Values and windows


def test_voxels_that_are_no_numbers(volumes, tmp_path):
    save_volume(tmp_path / "ct" / "a.nii.gz", scan().astype(np.complex64))
    refused(volumes, r"ct/a\.nii\.gz holds colours or complex numbers; give a volume of one number a voxel")
    colours = np.zeros((20, 16, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    save_volume(tmp_path / "ct" / "a.nii.gz", colours)
    refused(volumes, r"ct/a\.nii\.gz holds colours")


@pytest.mark.filterwarnings("error")
def test_voxels_outside_the_field_of_view(volumes, tmp_path):
    voxels = scan().astype(np.float32)
    voxels[:2], voxels[-1] = np.nan, np.inf
    save_volume(tmp_path / "ct" / "a.nii.gz", voxels)
    build(volumes)
    volume = json.loads((volumes.out / "meta_train.json").read_text())["volumes"]["a"]
    assert np.isfinite(volume["window"]).all() and volume["window"][0] < -900 and volume["window"][1] > 900
    pixels = np.asarray(Image.open(volumes.out / "a" / "a-000.png"))
    assert (pixels[:, -2:] == 0).all() and (pixels[:, 0] == 0).all() and pixels.max() > 200
    save_volume(tmp_path / "ct" / "a.nii.gz", voxels * np.float32(np.nan))
    refused(replace(volumes, out=tmp_path / "none"), r"ct/a\.nii\.gz has no voxel of a finite value")


def test_windows_and_sizes_that_are_none(volumes, images, tmp_path):
    for window in ((5, 5), (240, -160), (np.nan, 1), (-np.inf, np.inf)):
        refused(
            replace(volumes, window=window), r"window .* of .*a\.nii\.gz is empty or endless; give window"
        )
    save_volume(tmp_path / "ct" / "a.nii.gz", np.full((20, 16, 6), 1e15))
    refused(volumes, r"window 1e\+15\.\.1e\+15 of .*a\.nii\.gz is empty")
    for side in (0, -5):
        refused(replace(images, long_side=side), f"long_side={side} must be at least 1")


# ------------------------------------------------------------------------------------------------------------
# The place to write to


def test_nothing_beside_is_touched_and_permissions_are_ordinary(images, tmp_path):
    part = tmp_path / "more" / "out.part"
    part.mkdir(parents=True)
    (part / "mine").write_text("")
    options = replace(images, out=tmp_path / "more" / "out")
    mask = os.umask(0o027)
    try:
        build(options)
        build(replace(options, out=tmp_path / "new" / "parents" / "out"))
    finally:
        os.umask(mask)
    assert (part / "mine").exists() and {path.name for path in part.parent.iterdir()} == {"out", "out.part"}
    assert options.out.stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "new" / "parents" / "out" / "train.json").is_file()


def test_places_that_cannot_be_written(images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out cannot be created \(.*\); choose another place"):
        build(replace(images, out=tmp_path / "file" / "out"))

    def save_mask(path, mask):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("unibiomed_jax.datasets.build.save_mask", save_mask)
    number = errno.EACCES
    refused(images, r"out was not written \(.*Permission denied\)")
    number = errno.ENOSPC
    assert refused(images, "The disk of .*out is full; free some space").type is DiskFullError


def test_what_came_to_the_place_meanwhile_stays(images, monkeypatch):
    def save_json(path, table):
        images.out.mkdir(exist_ok=True)
        (images.out / "mine").write_text("")

    monkeypatch.setattr("unibiomed_jax.datasets.write.save_json", save_json)
    with pytest.raises(InputError, match="out was not written"):
        build(images)
    assert [path.name for path in images.out.iterdir()] == ["mine"]
