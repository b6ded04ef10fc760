"""Datasets made from images and masks or from volumes, and what `validate` says about good and bad ones."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image
from rich.console import Console
from small_datasets import SIZES, coco_table, save_picture, save_square, write_table

from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.pipeline import Pipeline, PipelineConfig
from unibiomed_jax.datasets.build import BuildOptions, build
from unibiomed_jax.datasets.validate import ValidateOptions, validate
from unibiomed_jax.datasets.write import assign_splits
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.volumes import apply_window
from unibiomed_jax.masks.resize import resize_mask


@pytest.fixture
def scans(tmp_path):
    """Twelve images of six patients, two targets in most, none in the last; one image of a longer name."""
    for number in range(12):
        save_picture(tmp_path / "scans" / f"P{number // 2}_{number}.png", seed=number)
        if number < 11:
            save_square(tmp_path / "masks" / f"P{number // 2}_{number}_kidney.png")
            save_square(tmp_path / "masks" / f"P{number // 2}_{number}_kidney+tumor.png", side=5)
    save_picture(tmp_path / "scans" / "P0_0_b.png")
    save_square(tmp_path / "masks" / "P0_0_b_kidney.png")
    return BuildOptions(
        tmp_path / "out",
        "MRI",
        "abdomen",
        images=tmp_path / "scans",
        masks=tmp_path / "masks",
        patient=r"^(P\d+)_",
        findings=("kidney tumor",),
    )


def tables(root, name):
    return {split: json.loads((root / name.format(split)).read_text()) for split in ("train", "val", "test")}


def test_images_and_masks(scans, byte_tokenizer):
    report = build(scans)
    assert [path.name for path in report.without_masks] == ["P5_11.png"]
    assert sum(report.annotations.values()) == 23 and sum(report.patients.values()) == 6
    found = tables(scans.out, "{}.json")
    people = [{image["patient"] for image in table["images"]} for table in found.values()]
    assert all(people) and len(set.union(*people)) == sum(map(len, people)) == 6
    for split, table in found.items():
        for row in table["annotations"]:
            image = Image.open(scans.out / split / row["file_name"])
            mask = np.asarray(Image.open(scans.out / f"{split}_mask" / row["mask_file"]))
            target = row["mask_file"][len(row["file_name"]) - 3 : -4].replace("+", " ")
            assert row["sentences"][0]["raw"] == f"{target} in abdomen MRI"
            assert mask.dtype == bool and mask.shape == image.size[::-1]
            assert mask.sum() == (25 if "tumor" in target else 144)
    findings = tables(scans.out, "{}_disease.json")
    assert sum(len(table["annotations"]) for table in findings.values()) == 11
    assert not validate(ValidateOptions(scans.out)).problems
    config = PipelineConfig(find_datasets(scans.out), batch_size=2)
    assert Pipeline(config, SIZES, byte_tokenizer).steps_per_epoch > 0


def test_long_side_and_another_seed(scans):
    build(replace(scans, long_side=30))
    table = tables(scans.out, "{}.json")["train"]
    assert {(image["width"], image["height"]) for image in table["images"]} == {(30, 15)}
    assert not validate(ValidateOptions(scans.out)).problems
    other = replace(scans, out=scans.out.with_name("other"), seed=1)
    build(other)
    assert tables(other.out, "{}.json")["test"] != tables(scans.out, "{}.json")["test"]


def test_masks_as_people_save_them(scans, tmp_path):
    """Compressed with losses, and with underscores for blanks."""
    mask = np.zeros((30, 60), np.uint8)
    mask[4:24, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "P0_0_left_adrenal_gland.jpg", quality=50)
    assert (np.asarray(Image.open(tmp_path / "masks" / "P0_0_left_adrenal_gland.jpg")) > 0).sum() > 400
    report = build(scans)
    assert report.targets == {"kidney": 12, "kidney tumor": 11, "left adrenal gland": 1}
    (written,) = scans.out.rglob("P0_0_left+adrenal+gland.png")
    np.testing.assert_array_equal(np.asarray(Image.open(written)), mask > 0)
    shutil.rmtree(scans.out)
    save_square(tmp_path / "masks" / "P0_0_left+adrenal_gland.png")
    with pytest.raises(InputError, match="are masks of one target"):
        build(scans)


def test_volumes(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    for name in ("a_1", "b_1", "c_1"):
        voxels = rng.integers(-1000, 1000, (20, 16, 6)).astype(np.int16)
        labels = np.zeros(voxels.shape, np.uint8)
        labels[2:8, 3:9, 1:4] = 1  # right, back
        labels[10:15, 3:9, 2] = 2
        for folder, values in (("ct", voxels), ("seg", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "names.json").write_text('{"1": "liver", "2": "spleen", "3": "absent"}')
    options = BuildOptions(
        tmp_path / "out", "CT", "abdomen", volumes=tmp_path / "ct", labels=tmp_path / "seg",
        label_names=tmp_path / "names.json", window=(-160, 240), fractions=(0.4, 0.3, 0.3),
    )  # fmt: skip
    build(options)
    for table in tables(options.out, "meta_{}.json").values():
        ((name, volume),) = table["volumes"].items()
        assert len(volume["slices"]) == 6 and volume["window"] == [-160, 240]
        liver, spleen = volume["expressions"].values()
        assert (liver["exp"], len(liver["mask_file"])) == ("liver in abdomen CT", 3)
        assert spleen["mask_file"] == [f"mask/{name}/{name}-002_spleen.png"]
        mask = np.asarray(Image.open(options.out / liver["mask_file"][0]))
        # x grows to the patient's right, the left of the picture; y grows to the front, which is up.
        assert np.argwhere(mask).min(0).tolist() == [16 - 9, 20 - 8] and mask.sum() == 36
        voxels = np.asanyarray(nibabel.load(tmp_path / "ct" / f"{name}.nii.gz").dataobj)
        pixels = np.asarray(Image.open(options.out / name / volume["slices"][1]))
        np.testing.assert_array_equal(pixels, apply_window(voxels[:, :, 1].T[::-1, ::-1], (-160, 240)))
    assert not validate(ValidateOptions(options.out)).problems
    (tmp_path / "names.json").write_text('{"7": "pancreas"}')
    with pytest.raises(InputError, match=r"hold none of the labels 7 \(pancreas\)"):
        build(replace(options, out=tmp_path / "none"))
    assert not list(tmp_path.glob("none*"))


def test_window():
    pixels = apply_window(np.array([-200.0, -160, 40, 240, 900]), (-160, 240))
    assert pixels.tolist() == [0, 0, 128, 255, 255]


def test_masks_shrink_by_area():
    mask = np.zeros((40, 40), bool)
    mask[3:29, 5:31] = True
    small = resize_mask(mask, (10, 10))
    assert abs(small.sum() * 16 - mask.sum()) < 0.1 * mask.sum()
    line = np.zeros((40, 40), bool)
    line[:, 9:11] = True
    assert resize_mask(line, (10, 10), 0.5).sum() == 10 and not resize_mask(line, (10, 10), 0.6).any()


def test_splits_are_by_patient_stable_and_near_the_shares():
    groups = [f"p{number}" for number in range(200) for _ in range(number % 5 + 1)]
    splits = assign_splits(groups, (0.7, 0.1, 0.2))
    shares = {
        split: np.mean([splits[group] == split for group in groups]) for split in ("train", "val", "test")
    }
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.02)
    assert assign_splits(groups[::-1], (0.7, 0.1, 0.2)) == splits
    assert sorted(assign_splits(["a", "b", "c"]).values()) == ["test", "train", "val"]
    assert assign_splits(["a", "b"], pinned={"a": "val"})["a"] == "val"
    assert set(assign_splits(["a", "b", "c"], (1, 0, 0)).values()) == {"train"}
    with pytest.raises(InputError, match="three shares that sum to 1"):
        assign_splits(groups, (0.7, 0.1, 0.1))
    with pytest.raises(InputError, match="Patient a is pinned to the split 'held out'"):
        assign_splits(["a"], pinned={"a": "held out"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": None}, "either images and masks, or volumes and labels"),
        ({"patient": "(x)"}, "finds no patient in the name 'P0_0"),
        ({"patient": "("}, "is no regular expression"),
        ({"fractions": (1, 1, 1)}, "three shares"),
        (
            {"findings": ("kidney stone",)},
            "'kidney stone' is no target; the targets are kidney, kidney tumor",
        ),
    ],
)
def test_wrong_options(scans, change, message):
    with pytest.raises(InputError, match=message):
        build(replace(scans, **change))
    assert not list(scans.out.parent.glob("out*"))


def test_wrong_files(scans, tmp_path):
    stray = tmp_path / "masks" / "P9_1_kidney.png"
    save_square(stray)
    with pytest.raises(InputError, match=r"P9_1_kidney\.png belongs to no image"):
        build(scans)
    stray.unlink()
    save_square(tmp_path / "masks" / "P0_0_kidney.png", size=(10, 10), side=3)
    with pytest.raises(InputError, match="10x10 pixels but its image 60x30"):
        build(scans)
    scans.out.mkdir()
    with pytest.raises(InputError, match="exists already"):
        build(scans)


# ------------------------------------------------------------------------------------------------------------
# validate


def sorts(root):
    report = validate(ValidateOptions(root))
    return {(problem.sort, problem.error) for problem in report.problems}, report


def test_a_good_dataset_has_a_table_and_no_problems(targets):
    found, report = sorts(targets)
    assert not found
    with Console(record=True, width=100, file=io.StringIO()) as console:
        console.print(report.table())
    text = console.export_text()
    assert "liver/segmentation" in text and text.count(" 5 ") == 2


def damage_table(edit):
    def change(root):
        table = coco_table(5)
        edit(table)
        write_table(root / "train.json", table)

    return change


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda r: (r / "train" / "1.png").unlink(), ("missing", True)),
        (lambda r: (r / "train_mask" / "1_liver.png").unlink(), ("missing", True)),
        (lambda r: (r / "train" / "1.png").write_bytes(b"x"), ("unreadable", True)),
        (lambda r: (r / "train_mask" / "1_liver.png").write_bytes(b"x"), ("unreadable", True)),
        (lambda r: save_square(r / "train_mask" / "1_liver.png", size=(30, 60)), ("mask size", True)),
        (lambda r: save_square(r / "train_mask" / "1_liver.png", side=0), ("empty mask", False)),
        (damage_table(lambda t: t["annotations"][1]["sentences"].clear()), ("schema", True)),
        (damage_table(lambda t: t["annotations"].append(t["annotations"][0])), ("duplicate", False)),
        (damage_table(lambda t: t["images"][1].update(width=30, height=60)), ("table size", True)),
    ],
)
def test_every_sort_of_problem_is_found(targets, damage, expected):
    damage(targets)
    found, report = sorts(targets)
    assert found == {expected}
    assert (
        len(report.problems) == 1 and "1" in report.problems[0].text or expected[0] in ("duplicate", "schema")
    )


def test_sizes_are_those_of_the_upright_image(targets):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 60)).save(targets / "train" / "1.png", exif=exif)
    write_table(targets / "train.json", coco_table(5, width=60, height=30))
    assert not sorts(targets)[0]


def test_no_findings_may_have_an_empty_mask(targets):
    save_square(targets / "train_mask" / "1_liver.png", side=0)
    write_table(targets / "train.json", coco_table(5, "no findings in abdomen CT"))
    assert not sorts(targets)[0]


def test_patients_and_names_in_two_splits(targets):
    for name in ("test", "test_mask"):
        (targets / name).mkdir()
    save_picture(targets / "test" / "0.png")
    save_square(targets / "test_mask" / "0_liver.png")
    write_table(targets / "train.json", coco_table(5, patient="ann"))
    write_table(targets / "test.json", coco_table(1, patient="bob"))
    assert sorts(targets)[0] == {("name in two splits", False)}
    write_table(targets / "test.json", coco_table(1, patient="ann"))
    found, report = sorts(targets)
    assert ("leaking patient", True) in found
    (problem,) = [problem for problem in report.problems if problem.error]
    assert problem.text.startswith("The patient ann is in test and train of liver/segmentation")


def test_nothing_to_validate(tmp_path):
    with pytest.raises(InputError, match="holds no table for the split"):
        validate(ValidateOptions(tmp_path))
