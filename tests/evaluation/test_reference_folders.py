"""The folders of the reference's scripts: what is written is read again, and what is broken is named."""

import json

import numpy as np
import pytest
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.paper_text import TextItem
from unibiomed_jax.evaluation.reference_folders import (
    read_answer,
    read_regions,
    read_seg2d,
    read_values,
    read_volumes,
    write_answer,
    write_mask,
    write_regions,
)


def test_answers_come_back(tmp_path):
    masks = [np.eye(3, 5, dtype=bool), np.zeros((3, 5), bool)]
    write_answer(tmp_path, "train/a.b.png", "a nodule.", ["a nodule"], masks)
    caption, found = read_answer(tmp_path / "a.b.json")
    assert caption == "a nodule." and np.array_equal(found, masks)
    write_answer(tmp_path, "c.jpg", "", [], None)
    assert read_answer(tmp_path / "c.json") == ("", [])
    assert "pred_masks" not in json.loads((tmp_path / "c.json").read_text())


def test_written_masks_are_black_and_white(tmp_path):
    mask = np.eye(3, 5, dtype=bool)
    write_mask(tmp_path / "vol" / "lung in chest CT" / "a.png", mask)
    found = read_values(tmp_path / "vol" / "lung in chest CT" / "a.png")
    assert found.dtype == np.uint8 and np.array_equal(found, mask * 255)


def test_regions_of_every_process(tmp_path):
    first, second = TextItem("1", "liver in ct", "liver in CT"), TextItem("2", "lung in ct", " in ")
    write_regions(tmp_path, [first], 1.0)
    write_regions(tmp_path, [second], 0.0)
    assert read_regions(tmp_path) == [second, first]
    with pytest.raises(InputError, match="no region_cap_pred"):
        read_regions(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{}", "{", "[]", '"text"', '{"a": 1}'])
def test_what_the_reference_passes_over_is_no_answer(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read_answer(tmp_path / "a.json") == (None, [])


def test_damaged_masks_are_named(tmp_path):
    answer = {"caption": "x", "pred_masks": [{"size": [3, 5], "counts": "01"}]}
    (tmp_path / "a.json").write_text(json.dumps(answer))
    with pytest.raises(InputError, match="a.json holds a mask that is no COCO run-length encoding"):
        read_answer(tmp_path / "a.json")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="a.png cannot be read as an image"):
        read_values(tmp_path / "a.png")


@pytest.mark.parametrize(
    "table, complaint",
    [
        ([], "is a list"),
        ({"annotations": {}}, "no list of annotations"),
        ({"annotations": [{"id": 3, "sentences": [{"sent": "x"}]}]}, "3 of the table has no mask_file"),
        (
            {"annotations": [{"id": 3, "mask_file": "a.png", "sentences": []}]},
            "3 of the table has no sentence",
        ),
        ({"annotations": [{"mask_file": "a.png", "sentences": [{"sent": "x"}]}]}, "a.png is missing"),
    ],
)
def test_tables_that_say_too_little(tmp_path, table, complaint):
    (tmp_path / "test.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=complaint):
        list(read_seg2d(tmp_path, tmp_path, "test"))


def test_slices_of_unknown_volumes(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "slice.png")
    with pytest.raises(InputError, match="slice.png is not named"):
        read_volumes(tmp_path, tmp_path)
