"""Tables on disk to records, and every way in which a table can be wrong."""

import json
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from small_datasets import coco_table, save_picture, write_table

from unibiomed_jax.data.files import check_files, image_size
from unibiomed_jax.data.mixture import find_datasets, read_mixture
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.images import open_image


def change(path, edit):
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))


def test_targets(targets):
    records = read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets)))
    assert [record.name for record in records] == [
        f"liver/segmentation:train/{i}_liver.png" for i in range(5)
    ]
    assert records[1].images == (str(targets / "train" / "1.png"),)
    assert records[1].masks == ((str(targets / "train_mask" / "1_liver.png"),),)
    assert records[1].texts == ("Liver in abdomen CT.",)
    assert image_size(records[1]) == (60, 30)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_image_sizes_are_those_of_the_upright_image(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = str(tmp_path / f"a.{ending}")
    Image.new("RGB", (60, 30)).save(path, exif=exif)
    assert image_size(Record("a", Kind.CAPTION, (path,))) == open_image(path)[0].size


def test_targets_are_paired_by_file_name_in_the_order_of_images(targets):
    table = coco_table(3)
    table["images"] = [{"file_name": "2.png"}, {"file_name": "0.png"}, {"file_name": "4.png"}]
    table["annotations"] = [table["annotations"][0], table["annotations"][2], table["annotations"][0]]
    write_table(targets / "train.json", table)
    names = [record.name for record in read_dataset(DatasetConfig(Kind.REGION, str(targets)))]
    prefix = "liver/region:train/"
    assert names == [f"{prefix}2_liver.png", f"{prefix}0_liver.png", f"{prefix}0_liver.png#2"]


def test_volumes_keep_the_slices_with_a_mask(volumes):
    (record,) = read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes)))
    assert len(record.images) == len(record.masks[0]) == 12
    assert record.images[0] == str(volumes / "v1" / "v1-001.png")
    assert record.masks[0][0].endswith("v1-001_lung+tumor.png")
    assert (record.frames, record.slices, record.texts) == (10, 10, ("Lung tumor in chest CT.",))


def test_a_mask_belongs_to_the_slice_of_exactly_its_stem(volumes):
    table = json.loads((volumes / "meta_train.json").read_text())
    table["volumes"]["v1"]["slices"] = ["v1-1.png", "v1-10.png"]
    masks = ["mask/v1/v1-10_lung.png"]
    table["volumes"]["v1"]["expressions"]["0"]["mask_file"] = masks
    write_table(volumes / "meta_train.json", table)
    (record,) = read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes)))
    assert [path.rsplit("/", 1)[1] for path in record.images] == ["v1-10.png"]


def test_a_mask_belongs_to_the_longest_name(volumes):
    change(volumes / "meta_train.json", lambda t: t["volumes"]["v1"].update(
        slices=["a_1.png", "a_1_b.png"], expressions={"0": {"exp": "liver", "mask_file": ["a_1_b_liver.png"]}}
    ))  # fmt: skip
    (record,) = read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes)))
    assert record.images == (str(volumes / "v1" / "a_1_b.png"),)


def test_slices_are_in_the_order_of_their_numbers(volumes):
    names = [f"v1-{number}" for number in (10, 2, 1, 100)]
    masks = [f"mask/v1/{name}_liver.png" for name in names]
    change(volumes / "meta_train.json", lambda t: t["volumes"]["v1"].update(
        slices=[f"{name}.png" for name in names], expressions={"0": {"exp": "liver", "mask_file": masks}}
    ))  # fmt: skip
    (record,) = read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes)))
    assert [Path(path).stem for path in record.images] == ["v1-1", "v1-2", "v1-10", "v1-100"]
    assert [Path(path).stem for path in record.masks[0]] == [f"v1-{n}_liver" for n in (1, 2, 10, 100)]


def test_nobody_is_called_none_and_whole_numbers_are_sizes(targets):
    table = coco_table(5, patient=None, width=60.0, height=30)
    table["images"][0]["patient"] = 0
    write_table(targets / "train.json", table)
    records = read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets)))
    assert [record.patient for record in records] == ["0", "", "", "", ""]
    assert {record.size for record in records} == {(60, 30)}


def test_no_findings_need_no_mask_file(findings):
    def edit(table):
        table["a"]["mask_file"] = ""
        del table["b"]["mask_file"]
        table["c"] |= {"abnormality": ["Nodule", "no findings"], "mask_file": ["train_mask/2.png", ""]}

    change(findings / "train_parse.json", edit)
    problems = []
    none, two = read_dataset(DatasetConfig(Kind.VQA, str(findings)), problems)
    assert none.masks == (("",),) and none.texts == ("no findings",)
    assert two.masks == ((str(findings / "train_mask" / "2.png"),), ("",))
    (problem,) = problems
    assert "'mask_file' of ['a'] is empty" in problem


def test_expressions_of_one_text_stay_apart(volumes):
    table = json.loads((volumes / "meta_train.json").read_text())
    expressions = table["volumes"]["v1"]["expressions"]
    expressions["1"] = expressions["0"]
    write_table(volumes / "meta_train.json", table)
    names = [record.name for record in read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes)))]
    assert len(set(names)) == 2


def test_findings(findings):
    one, none, two = read_dataset(DatasetConfig(Kind.VQA, str(findings)))
    assert one.anatomy == "Lung" and one.texts == ("Nodule",) and one.report == ""
    assert none.masks == (("",),)
    assert two.texts == ("Nodule", "Effusion") and len(two.masks) == 2
    assert read_dataset(DatasetConfig(Kind.REPORT, str(findings)))[0].report == '" A 5 mm nodule. "'


def test_captions(captions):
    caption, answer = read_dataset(DatasetConfig(Kind.CAPTION, str(captions)))
    assert caption.texts == (" A Chest X-ray. ",) and caption.question == "" and caption.masks == ()
    assert answer.question == "Is this a chest X-ray?"


@pytest.mark.parametrize(
    ("kind", "records", "expected"),
    [
        (Kind.SEGMENTATION, 2600, 1),
        (Kind.SEGMENTATION, 2500, 2),
        (Kind.SEGMENTATION, 7, 714),
        (Kind.SEGMENTATION, 6000, 1),
        (Kind.DISEASE, 1700, 2),
        (Kind.CAPTION, 1700, 2),
        (Kind.REGION, 1700, 1),
        (Kind.REGION, 1000, 3),
        (Kind.SEQUENCE, 3, 10),
        (Kind.VQA, 3, 2),
        (Kind.REPORT, 9000, 2),
    ],
)
def test_balancing_of_the_reference(kind, records, expected):
    assert DatasetConfig(kind, "x").repetitions(records) == expected


def test_mixture_lays_datasets_end_to_end(mixture):
    mixed = read_mixture(mixture)
    assert len(mixed.records) == 5 + 1 + 5 + 5 + 3 + 3 + 2
    assert mixed.order.tolist() == [*range(5), 5, 5, 5, *range(6, 24)]
    assert mixed.sizes[1] == ("volumes/sequence (train)", 1, 3)
    with pytest.raises(InputError, match="liver/segmentation.*another name"):
        read_mixture([mixture[0], mixture[0]])


def test_find_datasets_by_the_names_of_tables(tmp_path, targets, findings, captions, volumes):
    (captions / "train.json").rename(captions / "train_captions.json")
    write_table(targets / "train_disease.json", coco_table(5))
    found = find_datasets(tmp_path, "train", balance_to=0)
    assert {config.title.split("/", 1)[1] for config in found} == {
        "liver/segmentation", "liver/disease", "findings/vqa", "findings/report", "captions/caption",
        "volumes/sequence"}  # fmt: skip
    check_files(read_mixture(found).records)
    with pytest.raises(InputError, match="no table for the split 'test'"):
        find_datasets(tmp_path, "test")


def test_linked_datasets_are_found_once_and_loops_end(tmp_path, targets, captions):
    root = tmp_path / "data"
    (root / "inner").mkdir(parents=True)
    targets.rename(root / "own")
    (captions / "train.json").rename(captions / "train_captions.json")
    (root / "also").symlink_to(root / "own", target_is_directory=True)
    (root / "inner" / "loop").symlink_to(root, target_is_directory=True)
    (root / "linked").symlink_to(captions, target_is_directory=True)
    (captions / "back").symlink_to(root / "linked", target_is_directory=True)
    found = find_datasets(root, balance_to=0)
    assert [config.name for config in found] == ["data/linked/caption", "data/own/segmentation"]
    assert [config.root for config in found] == [str(root / "linked"), str(root / "own")]
    check_files(read_mixture(found).records)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert [config.name for config in find_datasets(tmp_path / "link")] == [config.name for config in found]


def test_tables_beside_their_images(volumes):
    save_picture(volumes / "a.png")
    save_picture(volumes / "a_mask.png")
    annotation = {"file_name": "a.png", "mask_file": "a_mask.png", "sentences": [{"raw": "x"}]}
    table = {"images": [{"file_name": "a.png"}], "annotations": [annotation]}
    write_table(volumes / "train.json", table)
    check_files(read_mixture(find_datasets(volumes, "train", balance_to=0)).records)


# ------------------------------------------------------------------------------------------------------------
# Bad input: one sentence with file, field and remedy.


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("images"), r"train\.json: the table lacks the field 'images'"),
        (lambda t: t.update(annotations={}), r"'annotations' of the table must be a list, not a object"),
        (lambda t: t["images"][0].pop("file_name"), r"images\[0\] lacks the field 'file_name'"),
        (lambda t: t["annotations"][2].pop("mask_file"), r"annotations\[2\] lacks the field 'mask_file'"),
        (
            lambda t: t["annotations"][2].update(file_name="9.png"),
            r"annotations\[2\] belongs to the image 9\.png",
        ),
        (lambda t: t["annotations"][1].update(sentences=[]), r"'sentences' of annotations\[1\] is empty"),
        (
            lambda t: t["annotations"][1].update(sentences=[{"raw": " "}]),
            r"annotations\[1\]\.sentences\[0\] is empty",
        ),
        (
            lambda t: t["annotations"][1].update(sentences=[{"raw": "\t.\n"}]),
            r"annotations\[1\]\.sentences\[0\] is empty",
        ),
        (
            lambda t: t["images"].append({"file_name": "0.png", "patient": "ann"}),
            r"images\[5\] is a second 0\.png of another size or patient",
        ),
        (lambda t: t["images"][0].update(width="60"), r"'width' of images\[0\] is '60'; give a whole number"),
        (lambda t: t["images"][0].update(height=1.5), r"'height' of images\[0\] is 1\.5"),
        (lambda t: t["images"][0].update(height=float("nan")), r"'height' of images\[0\] is nan"),
        (lambda t: t["images"][0].update(width=float("inf")), r"'width' of images\[0\] is inf"),
        (lambda t: t["images"][0].update(width=True), r"'width' of images\[0\] is True"),
        (lambda t: t.update(images=[], annotations=[]), r"holds no samples for segmentation"),
    ],
)
def test_wrong_tables_of_targets(targets, edit, message):
    change(targets / "train.json", edit)
    with pytest.raises(InputError, match=message):
        read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets)))


def test_wrong_tables_of_other_kinds(findings, captions):
    change(findings / "train_parse.json", lambda t: t["c"].update(mask_file="train_mask/2.png"))
    with pytest.raises(InputError, match=r"\['c'\] has 2 abnormalities but 1 mask files"):
        read_dataset(DatasetConfig(Kind.REPORT, str(findings)))
    write_table(findings / "train_parse.json", [])
    with pytest.raises(InputError, match="must be a JSON object"):
        read_dataset(DatasetConfig(Kind.VQA, str(findings)))
    change(captions / "train.json", lambda t: t["annotations"][0].update(caption=None))
    with pytest.raises(InputError, match=r"'caption' of annotations\[0\] must be a string, not a null"):
        read_dataset(DatasetConfig(Kind.CAPTION, str(captions)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, r"'images' of the table must be a list, not a null"),
        (["0.png"], r"images\[0\] must be an object with the field 'file_name', not a string"),
    ],
)
def test_wrong_images_of_captions(captions, images, message):
    change(captions / "train.json", lambda t: t.update(images=images))
    with pytest.raises(InputError, match=message):
        read_dataset(DatasetConfig(Kind.CAPTION, str(captions)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["slices"].pop(3), r"'0'\] has the mask mask/v1/v1-003_lung\+tumor\.png, which is not"),
        (
            lambda v: v["expressions"]["0"]["mask_file"].append("other/v1-003_lung+tumor.png"),
            r"two masks for the slice v1-003\.png \(mask/v1/v1-003_.*, other/v1-003_lung\+tumor\.png\)",
        ),
        (lambda v: v["expressions"]["0"]["mask_file"].clear(), r"expressions\['0'\] has no masks"),
        (lambda v: v["slices"].append("v1-003.jpg"), r"two slices of volumes\['v1'\] have one name without"),
        (lambda v: v["slices"].append(7), r"'slices\[14\]' of volumes\['v1'\] must be a string"),
    ],
)
def test_wrong_tables_of_volumes(volumes, edit, message):
    change(volumes / "meta_train.json", lambda t: edit(t["volumes"]["v1"]))
    with pytest.raises(InputError, match=message):
        read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes)))


def test_missing_folders_and_files(tmp_path, targets):
    with pytest.raises(InputError, match=r"train\.json is a file; give the folder it lies in"):
        find_datasets(targets / "train.json")
    with pytest.raises(InputError, match="folder .*nothing does not exist"):
        read_dataset(DatasetConfig(Kind.SEGMENTATION, str(tmp_path / "nothing")))
    with pytest.raises(InputError, match=r"test\.json does not exist"):
        read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets), split="test"))
    records = read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets)))
    check_files(records)
    (targets / "train_mask" / "3_liver.png").unlink()
    with pytest.raises(InputError, match=r"train/3_liver\.png needs the file .*3_liver\.png, which does not"):
        check_files(records)
    (targets / "train.json").write_text('{"images": [], "annotations": [], "images": []}')
    with pytest.raises(InputError, match=r"train\.json is not valid JSON \(the key 'images' occurs twice"):
        read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets)))
    (targets / "train.json").write_text("{")
    with pytest.raises(InputError, match=r"train\.json is not valid JSON"):
        read_dataset(DatasetConfig(Kind.SEGMENTATION, str(targets)))
    with pytest.raises(InputError, match="no datasets"):
        read_mixture([])
