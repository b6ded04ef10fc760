"""`unibiomed data`: what it says, and how it ends."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def kidneys(tmp_path) -> list[str]:
    """Three scans with one mask each; the options that build a dataset of them."""
    for name in ("scans", "masks"):
        (tmp_path / name).mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "scans" / f"P{number}.png")
        Image.fromarray(pixels[..., 0] > 128).save(tmp_path / "masks" / f"P{number}_left+kidney.png")
    return "--out kidneys --modality MRI --site abdomen --images scans --masks masks".split()


def test_a_dataset_is_built_and_checked(unibiomed, kidneys, tmp_path):
    built = unibiomed("data", "build", *kidneys, "--findings", "left kidney", "--fractions", "1", "0", "0")
    assert built.returncode == 0, built.stderr
    assert "left kidney (3)" in built.stdout and (tmp_path / "kidneys" / "train_disease.json").is_file()
    checked = unibiomed("data", "validate", "kidneys")
    assert checked.returncode == 0, checked.stderr
    assert "kidneys/segmentation" in checked.stdout and "0 errors, 0 warnings" in checked.stdout
    (tmp_path / "kidneys" / "train" / "P1.png").unlink()
    checked = unibiomed("data", "validate", "kidneys", "--show", "1")
    assert checked.returncode == 1
    assert "error (missing) kidneys/segmentation:train/P1_left+kidney.png: kidneys/train/P1.png does" in (
        checked.stdout
    )
    assert "... and 2 more" in checked.stdout and "3 errors, 0 warnings" in checked.stdout


def test_what_cannot_be_built_or_checked_is_one_sentence(unibiomed, kidneys):
    for arguments, reason in (
        (["build", *kidneys, "--patient", "["], "patient='[' is no regular expression"),
        (["validate", "[nowhere]"], "The dataset folder [nowhere] does not exist"),
    ):
        run = unibiomed("data", *arguments)
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
        assert reason in run.stderr
