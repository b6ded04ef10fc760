"""Masks by the paper's protocol: the reference's own numbers, its edge cases, and OpenCV's resizing."""

import json
import math

import numpy as np
import pytest

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation import paper
from unibiomed_jax.evaluation.paper_masks import (
    ImageItem,
    MaskItem,
    VolumePair,
    mean_dice,
    resize_linear,
    seg2d,
    seg3d,
    volumes,
)
from unibiomed_jax.evaluation.records import Sample, encode_masks
from unibiomed_jax.evaluation.reference_folders import read_grounded, read_seg2d, read_seg3d, read_volumes
from unibiomed_jax.evaluation.repairs import Repairs


def assert_equal(found, expected, where=""):
    """Floats within 1e-12, everything else exactly."""
    if isinstance(expected, dict):
        assert list(map(str, found)) == list(expected), where
        for key, value in expected.items():
            assert_equal({str(k): v for k, v in found.items()}[key], value, f"{where}/{key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-12, rel=0), where
    else:
        assert found == expected, where


def strict_repairs():
    return Repairs(allowed=False)


def test_masks_of_a_table(golden):
    found = seg2d(read_seg2d(golden / "seg2d/data", golden / "seg2d/pred", "test"), strict_repairs())
    assert_equal(found, json.loads((golden / "seg2d/results.json").read_text()))


def test_only_the_first_300_count(golden):
    arrays = np.load(golden / "seg2d_limit/masks.npz")
    table = json.loads((golden / "seg2d_limit/annotations.json").read_text())
    assert len(table) == 303
    items = [
        MaskItem(row["mask_file"], row["sent"], truth, predicted)
        for row, truth, predicted in zip(table, arrays["truth"], arrays["prediction"], strict=True)
    ]
    assert_equal(
        seg2d(items, strict_repairs()), json.loads((golden / "seg2d_limit/results.json").read_text())
    )


def test_volumes_of_a_table(golden):
    found = seg3d(read_seg3d(golden / "seg3d/data", golden / "seg3d/pred", "test"), strict_repairs())
    assert_equal(found, json.loads((golden / "seg3d/results.json").read_text()))


def test_volumes_of_two_folders(golden):
    pairs, without_truth = read_volumes(golden / "cal3d/gt", golden / "cal3d/pred")
    found = volumes(pairs, strict_repairs())
    expected = json.loads((golden / "cal3d/per_volume.json").read_text())
    assert without_truth == []
    flat = {f"{t}/{v}": s for t, of_target in found["volumes"].items() for v, s in of_target.items()}
    for name, scores in expected.items():
        assert_equal({key: flat[name][key] for key in scores}, scores)
    assert len(flat) == len(expected)
    printed = (golden / "cal3d/stdout.txt").read_text().splitlines()
    for line in printed:
        if line.startswith("label, "):
            name, dice, nsd, hd95 = line.split()[-4:]
            assert_equal(
                found["targets"][name], {"dice": float(dice), "nsd": float(nsd), "hd95": float(hd95)}
            )
    dice, nsd, hd95 = map(float, printed[-1].split()[-3:])
    assert_equal(found["mean"], {"dice": dice, "nsd": nsd, "hd95": hd95})


@pytest.mark.parametrize("task, folder", [("disease", "disease"), ("gvqa", "gvqa"), ("report", "grg")])
def test_masks_of_grounded_answers(golden, task, folder):
    items = read_grounded(task, golden / folder / "data", golden / folder / "pred", "test", strict_repairs())
    expected = json.loads((golden / folder / "expected.json").read_text())
    mean, scores = mean_dice(items.images, strict_repairs())
    assert_equal(mean, expected["mdice"])
    assert_equal(scores, expected["dice_per_image"])


def opened(*bits):
    return np.array(bits, np.uint8)


def test_all_truths_empty():
    found = seg2d([MaskItem("a.png", "liver", opened([0, 0]), opened([0, 1]))], strict_repairs())
    assert found == {
        "mean": {"mean_class_dice": 0.0, "mean_class_iou": 0.0, "mean_dice": 0.0, "mean_iou": 0.0},
        "a.png": {},
    }


def test_what_seg2d_cannot_do_is_refused_or_repaired():
    truth = opened([0, 1, 1, 0])
    for item, complaint, dice in (
        (MaskItem("a.png", "liver", truth, None), "FileNotFoundError", 0.0),
        (MaskItem("a.png", "liver", truth, np.repeat(truth[..., None], 3, 2)), "ValueError", 1.0),
        (MaskItem("a.png", "liver", truth > 0, np.repeat(truth, 2, 1)), "OpenCV", None),
    ):
        with pytest.raises(InputError, match=f"{complaint}.*--repair"):
            seg2d([item], strict_repairs())
        repairs = Repairs(allowed=True)
        found = seg2d([item], repairs)["a.png"]["dice"]
        assert len(repairs.notes) == 1 and "a.png" in repairs.notes[0]
        if dice is not None:
            assert found == dice
        else:
            assert 0.5 < found < 1


def ball(shift=0, side=6):
    mask = np.zeros((4, side, side), bool)
    mask[1:3, 1 + shift : 4 + shift, 1:4] = True
    return mask


def test_volumes_that_the_script_cannot_do():
    same = [VolumePair("liver", "a-b", ball(), ball())]
    with pytest.raises(InputError, match="IndexError"):
        volumes(same, strict_repairs())
    repaired = volumes(same, Repairs(allowed=True))["volumes"]["liver"]["a-b"]
    assert repaired["hd95"] == 0 and repaired["nsd"] == pytest.approx(1)
    one_missing = [
        VolumePair("liver", "a-b", ball(1), ball()),
        VolumePair("liver", "c-d", ball(1), ball()),
        VolumePair("tumor", "a-b", ball(1), ball()),
    ]
    with pytest.raises(InputError, match="tumor is missing in c-d"):
        volumes(one_missing, strict_repairs())


def test_an_empty_volume_has_no_distance():
    empty = ball() & False
    pairs = [VolumePair("liver", "a-b", empty, ball()), VolumePair("liver", "c-d", ball(1), ball())]
    found = volumes(pairs, strict_repairs())
    assert found["volumes"]["liver"]["a-b"]["dice"] == found["volumes"]["liver"]["a-b"]["nsd"] == 0
    assert math.isnan(found["mean"]["hd95"]) and not math.isnan(found["mean"]["nsd"])


def test_grounded_masks_that_cannot_be_compared():
    truth = opened([1, 1, 0], [0, 0, 0])
    for item in (
        ImageItem("0", [truth], [np.ones((4, 5), bool)]),
        ImageItem("0", [np.repeat(truth[..., None], 3, 2)], [truth > 0]),
        ImageItem("0", [truth[:1]], [truth > 0]),  # numpy would stretch it
        ImageItem("0", [truth], []),
    ):
        with pytest.raises(InputError, match="--repair"):
            mean_dice([item], strict_repairs())
        repairs = Repairs(allowed=True)
        mean, _ = mean_dice([item], repairs)
        assert 0 <= mean <= 1 and len(repairs.notes) == 1


def test_a_prediction_finds_one_partner():
    truth = opened([1, 1, 1, 0]) > 0
    half = opened([1, 0, 0, 0]) > 0
    assert mean_dice([ImageItem("0", [truth], [half, truth])], strict_repairs())[0] == 1
    assert mean_dice([ImageItem("0", [truth, truth], [truth, half])], strict_repairs())[0] == pytest.approx(
        0.75
    )


# Bytes, size, new size, and what opencv-python-headless 4.11.0.86 makes of them: cv2.resize(image, size).
OPENCV = [
    (
        "ff0303010100000000ff03ff0303ff03030303ff",
        (5, 4),
        (7, 9),
        "ffd5650303030201016e5c2b010101010100010d2d4525051d3d49002a9cf1811165d5ff020e2f5181b18d5d4b0303030b4b8b85756f03030303030365d5ff",
    ),
    (
        "0103ffff0000ffff0001ff0101ff010103030000ffffff03ff0101ff00010001ff000101ff00030100ff0001010100ff",
        (8, 6),
        (4, 3),
        "818040408042408001400280",
    ),
    (
        "ff01000101ff01000103ff03ff00ff00030100030103010003010303ff010003ffffff03010100000101030303ffffffff01ffff0001030303000100ff0001",
        (9, 7),
        (4, 3),
        "20a0aa0c03030220216b0002",
    ),
    (
        "ff000000",
        (1, 4),
        (3, 2),
        "7f0080007f00",
    ),
    (
        "03ffff03ffffff000103010103ff030003ff000301ff0001ff0100ffffffff0103ff03ff",
        (6, 6),
        (9, 9),
        "0381ffff812dd5ffff8180808042186b8080d5802308020201162b2d81b2250201026cd502416c17416a1641802a17020180db4e2b2bd56b010080f8dcd5d5ff80010180ea96c0ffff80010281d52d81ff",
    ),
]


@pytest.mark.parametrize("given, size, wanted, expected", OPENCV)
def test_bytes_are_resized_as_opencv_does(given, size, wanted, expected):
    image = np.frombuffer(bytes.fromhex(given), np.uint8).reshape(size)
    assert resize_linear(image, wanted).tobytes().hex() == expected


def test_a_disease_is_asked_about_once_an_image():
    """Two findings of one image are one image, matched with the masks of its one answer, without words."""
    left, right = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :2], right[:, 2:] = True, True

    def sample(name, image, truth):
        return Sample(
            "disease", name, "?", answer="cyst", response="[SEG]. Cyst.", image=image,
            truth_masks=encode_masks([truth]), masks=encode_masks([left]),
        )  # fmt: skip

    samples = [sample("a", "1.png", left), sample("b", "1.png", right), sample("c", "2.png", right)]
    found = paper.from_samples("disease", samples)
    assert [len(image.truths) for image in found.images] == [2, 1]
    assert [text.name for text in found.texts] == ["c"] and set(found.unscored) == {"a", "b"}
    numbers = paper.score("disease", found, None, Repairs(allowed=False))
    assert numbers["metrics"]["mdice"] == 0.5 and numbers["images"] == 2
