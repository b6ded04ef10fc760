"""`unibiomed data validate`: everything that is wrong, at once, as training would meet it."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console
from small_datasets import coco_table, save_picture, write_table

from unibiomed_jax.data.files import check_files
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.datasets.validate import ValidateOptions, validate
from unibiomed_jax.errors import InputError


def problems(root) -> list[tuple[str, str]]:
    return [(problem.sort, problem.text) for problem in validate(ValidateOptions(root)).problems]


def test_a_wrong_entry_does_not_hide_the_others(targets):
    table = coco_table(5)
    table["annotations"][0]["sentences"] = [{"raw": ""}]
    table["annotations"][1]["sentences"] = []
    write_table(targets / "train.json", table)
    (targets / "train" / "3.png").unlink()
    first, second, third = problems(targets)
    assert first[0] == second[0] == "schema" and third[0] == "missing"
    assert "annotations[0].sentences[0]" in first[1] and "annotations[1]" in second[1] and "3.png" in third[1]


def test_an_image_that_training_would_refuse(targets):
    save_picture(targets / "train" / "1.png")
    pages = [Image.new("L", (60, 30), value) for value in (0, 9)]
    pages[0].save(targets / "train" / "1.tif", save_all=True, append_images=pages[1:])
    table = coco_table(5)
    for entry in (table["images"][1], table["annotations"][1]):
        entry["file_name"] = "1.tif"
    write_table(targets / "train.json", table)
    ((sort, text),) = problems(targets)
    assert sort == "unreadable" and "1.tif" in text and "2 frames" in text


def test_one_mask_of_two_images(targets):
    table = coco_table(5)
    table["annotations"][1] |= {"mask_file": "0_liver.png", "sentences": [{"raw": "Spleen."}]}
    write_table(targets / "train.json", table)
    ((sort, text),) = problems(targets)
    assert sort == "duplicate" and "is the mask of 2 images" in text and "1.png" in text


def test_a_volume_in_two_splits(volumes):
    (volumes / "meta_test.json").write_text((volumes / "meta_train.json").read_text())
    found = problems(volumes)
    assert {sort for sort, _ in found} == {"name in two splits"}
    assert "The image or volume v1 is in test and train" in found[0][1]


def test_slices_of_several_sizes(volumes):
    for name in ("v1/v1-004.png", "mask/v1/v1-004_lung+tumor.png"):
        with Image.open(volumes / name) as image:
            image.resize((30, 30)).save(volumes / name)
    ((sort, text),) = problems(volumes)
    assert sort == "slice size" and "v1-004.png is 30x30 pixels but" in text
    records = read_dataset(DatasetConfig(Kind.SEQUENCE, str(volumes)))
    with pytest.raises(InputError, match=r"v1-004\.png .* is 30x30 .*v1-001\.png 60x30; resample all slices"):
        check_files(records)


def test_images_outside_the_folder_and_people_without_a_name(targets, tmp_path):
    save_picture(tmp_path / "elsewhere" / "0.png")
    table = coco_table(5, patient=None)
    for entry in (table["images"][0], table["annotations"][0]):
        entry["file_name"] = str(tmp_path / "elsewhere" / "0.png")
    write_table(targets / "train.json", table)
    assert problems(targets) == []


def test_the_table_can_be_read_in_a_narrow_terminal(tmp_path, targets):
    (tmp_path / "a_dataset_with_a_long_name").symlink_to(targets)
    report = validate(ValidateOptions(tmp_path))
    with Console(record=True, width=80, file=io.StringIO()) as console:
        console.print(report.table())
    lines = [line.split("│")[1].strip() for line in console.export_text().splitlines() if "│" in line]
    assert json.dumps("".join(lines)).count("/segmentation") == 1
