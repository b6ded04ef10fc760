"""Prediction folders as records: everything that the table lists, with what our own tables say beside."""

import json

import numpy as np
import pytest
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.records import decode_masks
from unibiomed_jax.evaluation.reference_folders import write_mask
from unibiomed_jax.evaluation.reference_samples import NO_FILE, read_samples


@pytest.fixture
def dataset(tmp_path):
    """Two masks of one image, of which one was answered; and a volume of three slices, one with a truth."""
    mask = np.eye(4, 6, dtype=bool)
    write_mask(tmp_path / "test_mask" / "a_liver.png", mask)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "test_mask" / "a_spleen.png")
    write_mask(tmp_path / "pred" / "test" / "a_liver.png", ~mask)
    table = {
        "images": [{"id": 0, "file_name": "a.png", "patient": 7, "spacing": [0.5, 0.7]}],
        "annotations": [
            {"file_name": "a.png", "mask_file": f"a_{target}.png", "sentences": [{"sent": target}]}
            for target in ("liver", "spleen")
        ],
    }
    (tmp_path / "test.json").write_text(json.dumps(table))
    names = ["v-1.png", "v-2.png", "v-10.png"]
    expression = {"exp": "liver", "mask_file": ["mask/v-2_liver.png"], "img_file": ["v/v-2.png"]}
    volume = {"slices": names, "expressions": {"0": expression}, "spacing": [5, 0.5, 0.7]}
    (tmp_path / "meta_test.json").write_text(json.dumps({"volumes": {"v": volume}}))
    write_mask(tmp_path / "mask" / "v-2_liver.png", mask)
    for name in names:
        write_mask(tmp_path / "pred" / "v" / "liver" / name, mask)
    return tmp_path


def change(path, key, value, *place):
    content = json.loads(path.read_text())
    row = content
    for name in place:
        row = row[name]
    row[key] = value
    path.write_text(json.dumps(content))


def test_masks_of_images(dataset):
    liver, spleen = read_samples("seg2d", dataset, dataset / "pred", "test")
    assert (liver.patient, liver.spacing, liver.category, liver.reason) == ("7", (0.5, 0.7), "liver", None)
    (truth,) = decode_masks(liver.truth_masks, "x")
    (predicted,) = decode_masks(liver.masks, "x")
    assert np.array_equal(truth, np.eye(4, 6, dtype=bool)) and np.array_equal(predicted, ~truth)
    assert (spleen.masks, spleen.reason) == ((), NO_FILE)
    assert not decode_masks(spleen.truth_masks, "x")[0].any()


def test_volumes_have_all_their_slices(dataset):
    (volume,) = read_samples("seg3d", dataset, dataset / "pred", "test")
    assert (volume.patient, volume.spacing, volume.image) == ("v", (5.0, 0.5, 0.7), "v")
    assert [piece.any() for piece in decode_masks(volume.truth_masks, "x")[0]] == [False, True, False]
    assert decode_masks(volume.masks, "x")[0].shape == (3, 4, 6)
    (dataset / "pred" / "v" / "liver" / "v-10.png").unlink()
    (volume,) = read_samples("seg3d", dataset, dataset / "pred", "test")
    assert (volume.masks, volume.reason) == ((), "slices without a prediction")


def test_tables_that_do_not_fit(dataset):
    table, volumes = dataset / "test.json", dataset / "meta_test.json"
    change(table, "spacing", [1, 1, 1], "images", 0)
    with pytest.raises(InputError, match="give 2 millimetres above 0"):
        read_samples("seg2d", dataset, dataset / "pred", "test")
    change(table, "spacing", None, "images", 0)
    change(table, "mask_file", "a_liver.png", "annotations", 1)
    with pytest.raises(InputError, match="lists a_liver.png twice"):
        read_samples("seg2d", dataset, dataset / "pred", "test")
    write_mask(dataset / "pred" / "v" / "liver" / "v-10.png", np.zeros((5, 6), bool))
    with pytest.raises(InputError, match="the prediction of v, liver have 2 sizes"):
        read_samples("seg3d", dataset, dataset / "pred", "test")
    change(volumes, "volumes", {})
    with pytest.raises(InputError, match="holds nothing to score for seg3d"):
        read_samples("seg3d", dataset, dataset / "pred", "test")
