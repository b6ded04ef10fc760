"""Every script of examples/ runs from an empty folder and does what it says."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from places import MICRO, ROOT, SAMPLE_DATA, TINY

from unibiomed_jax import checkpoint
from unibiomed_jax.inference.answer import INTENDED_USE
from unibiomed_jax.inputs.masks import open_mask
from unibiomed_jax.masks.measures import dice_score
from unibiomed_jax.parameters import flatten

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
# Named as their tests; the demo has a file of its own.
TESTED = {"ask", "batch", "convert", "region", "several_turns", "train", "volume"}


def run(name: str, folder) -> str:
    """What a script prints when it is started in `folder`."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED | {"demo"}
    assert {name.removeprefix("test_example_") for name in globals() if "test_example_" in name} == TESTED


def test_example_ask(tmp_path):
    said = run("ask", tmp_path)
    assert "[SEG] fetal head in fetal ultrasound." in said and INTENDED_USE in said
    truth = open_mask(SAMPLE_DATA / "hc18_fetal_head/test_mask/1044_fetal+head.png")
    found = open_mask(tmp_path / "mask_0.png")
    assert dice_score(found, truth) > 0.7
    assert f"{found.mean():.0%} of the image" in said
    with Image.open(tmp_path / "overlay.png") as picture:
        assert picture.width >= 768 and np.asarray(picture).std() > 10


def test_example_region(tmp_path):
    said = run("region", tmp_path)
    assert len(re.findall(r"^\S*left\+lung.png: left lung in chest x-ray$", said, re.MULTILINE)) == 1
    assert len(re.findall(r"^\S*right\+lung.png: right lung in chest x-ray$", said, re.MULTILINE)) == 1
    by_box = re.findall(r"^\(\d+, \d+, \d+, \d+\): (.*)$", said, re.MULTILINE)
    assert by_box == ["left lung in chest x-ray", "right lung in chest x-ray"]
    assert INTENDED_USE in said


def test_example_several_turns(tmp_path):
    said = run("several_turns", tmp_path)
    first, second = re.findall(r"^    (read images .*)$", said, re.MULTILINE)
    assert "encode image" in first and "encode image" not in second
    assert "encode tiles 0.00 s" in second
    left, right = ([int(x) for x in pair] for pair in re.findall(r"columns (\d+) to (\d+)", said))
    assert right[1] < left[0]  # the patient's left is on the right of the picture
    transcript = said.partition("The conversation so far:\n")[2]
    assert transcript.count("<img>") == 1 and transcript.count("<|user|>") == 2
    assert INTENDED_USE in said


def test_example_volume(tmp_path):
    said = run("volume", tmp_path)
    assert INTENDED_USE in said and said.count("(shown)") == 3 and said.count("(followed)") == 9
    answer = json.loads((tmp_path / "volume_answer" / "answer.json").read_text())
    (segment,) = answer["segments"]
    assert "sarcoma" in segment["phrase"] and len(segment["mask"]) == 12
    assert len(list((tmp_path / "volume_answer" / "overlay").glob("*.png"))) == 12
    files = sorted((tmp_path / "volume_answer").glob("mask_0*/*.png"))
    truth = sorted((SAMPLE_DATA / "sarcoma_ct/mask/STS_008_ct").glob("*.png"))
    found, true = (np.concatenate([open_mask(path) for path in paths]) for paths in (files, truth))
    assert dice_score(found, true) > 0.25  # all pixels would give less than 0.1


def test_example_batch(tmp_path):
    said = run("batch", tmp_path)
    for target in ("fetal head in fetal ultrasound", "optic disc in retinal fundus", "lungs in chest x-ray"):
        assert said.count(f"[SEG] {target}.") == 2
    alike = [float(share) for share in re.findall(r"([\d.]+)% of the pixels alike", said)]
    assert len(alike) == 3 and min(alike) >= 99.9
    assert INTENDED_USE in said


def test_example_train(tmp_path):
    said = run("train", tmp_path)
    assert "28,896 of 4,089,562 parameters train" in said
    folder = tmp_path / "runs" / "example"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["masks"] == 4 for line in lines)

    before, after = (flatten(checkpoint.load(path).params) for path in (TINY, folder / "model"))
    changed = {
        path for path in before if not np.array_equal(np.float32(before[path]), np.float32(after[path]))
    }
    assert changed == {path for path in before if path.startswith("text_hidden_fcs.")}
    assert checkpoint.read_config(folder / "model").sam2.image_size == 128


def test_example_convert(tmp_path):
    assert run("convert", tmp_path).endswith("Every bit came back.\n")
    assert checkpoint.is_checkpoint(tmp_path / "converted")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "released_again" / name).read_bytes() == (MICRO / name).read_bytes()
