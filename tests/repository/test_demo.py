"""The demo runs from nothing but the repository, and every answer carries the notice."""

import json
import shutil
import subprocess
import sys

import pytest
from places import ROOT

from unibiomed_jax.inference.answer import INTENDED_USE


@pytest.mark.slow
def test_the_demo_answers_and_says_what_it_is(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    said = " ".join(done.stdout.split())
    assert INTENDED_USE in said and "small teaching model" in said
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 8 and said.count("Dice") == 8
    for folder in folders:
        answer = json.loads((folder / "answer.json").read_text())
        assert answer["notice"] == INTENDED_USE
        masks = answer["masks" if (folder / "study.html").is_file() else "segments"]
        assert len(masks) == len(list(folder.glob("mask_*"))) > 0
        assert list(folder.glob("overlay*")) or list(folder.glob("mask_*.nii.gz"))
    assert sum((folder / "study.html").is_file() for folder in folders) == 1


def test_what_is_missing_is_one_line(tmp_path):
    script = tmp_path / "examples" / "demo.py"  # beside which there is no model
    script.parent.mkdir()
    shutil.copy(ROOT / "examples" / "demo.py", script)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    error = done.stderr
    assert error.startswith("Error: ") and error.count("\n") == 1 and "checkpoints/unibiomed-tiny" in error
