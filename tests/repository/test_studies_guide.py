"""docs/studies.md: its commands run and leave what it says."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
from places import ROOT

nibabel = pytest.importorskip("nibabel")

GUIDE = (ROOT / "docs" / "studies.md").read_text()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in which the guide's paths lead to the repository."""
    for name in ("sample_data", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_list_and_answer_the_scan(checkout, unibiomed):
    list_it, ask = (shlex.split(line)[1:] for line in GUIDE.splitlines() if line.startswith("unibiomed "))
    listed = unibiomed(*list_it)
    assert listed.returncode == 0 and "series-1" in listed.stdout and "axial" in listed.stdout
    # The first pass over all slices, which chooses them, is left out: it takes most of the time.
    asked = unibiomed(*ask, "--conditioning", "21")
    assert asked.returncode == 0, asked.stderr
    names = {path.name for path in (checkout / "bundle").iterdir()}
    assert names == {"answer.json", "study.html", "mask_1_soft_tissue_sarcoma_in_body_ct.nii.gz"}
    record = json.loads((checkout / "bundle" / "answer.json").read_text())
    (mask,) = record["masks"]
    assert mask["volume_ml"] > 20 and record["window"]["from"] == "preset soft tissue"
    truth = nibabel.load(ROOT / "sample_data" / "sarcoma_ct" / "STS_025_ct_mask.nii.gz")
    found = nibabel.load(checkout / "bundle" / "mask_1_soft_tissue_sarcoma_in_body_ct.nii.gz")
    assert np.array_equal(found.affine, truth.affine)
    found, truth = np.asarray(found.dataobj) > 0, np.asarray(truth.dataobj) > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.4
    assert unibiomed(*ask, "--conditioning", "21").stdout.count("is answered already") == 1


def test_masks_of_ones_own_are_written(checkout):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(code, "docs/studies.md", "exec"), {})
    names = {path.name for path in (checkout / "bones").iterdir()}
    assert names == {"mask_1_bone.nii.gz", "masks_coco.json", "study.html", "study.json"}


def test_every_format_is_explained():
    from unibiomed_jax.outputs.study_folder import FORMATS

    rows = re.findall(r"^\| (`.*?`) \|", GUIDE.split("`--formats`")[1], re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(FORMATS)
