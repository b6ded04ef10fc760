"""scripts/build_sample_dataset.py: it writes what is in the repository, and replaces nothing else."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image
from places import ROOT

SAMPLE = ROOT / "sample_data"
# The folders it comes from, where they lie beside the repository.
DATA = ROOT.parent / "shared" / "data"
needs_sources = pytest.mark.skipif(not DATA.is_dir(), reason="the source folders are not here")


@pytest.fixture
def command(monkeypatch):
    """Runs the script; its exit code."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(data, out):
        path = ROOT / "scripts" / "build_sample_dataset.py"
        monkeypatch.setattr(sys, "argv", [str(path), "--data", str(data), "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        return stop.value.code

    return run


def content(path):
    """Bytes, of images their pixels: other encoders write other bytes."""
    if path.suffix not in (".png", ".jpg"):
        return path.read_bytes()
    with Image.open(path) as image:
        return image.mode, np.asarray(image).tobytes(), image.size


def files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@needs_sources
def test_it_writes_the_dataset_of_the_repository(command, tmp_path):
    out = tmp_path / "sample"
    out.mkdir()
    for name in ("README.md", "ATTRIBUTION.md"):
        (out / name).write_bytes((SAMPLE / name).read_bytes())
    (out / "old.json").write_text("")
    assert command(DATA, out) == 0
    written, expected = files(out), files(SAMPLE)
    assert written.keys() == expected.keys()
    assert not [name for name in expected if content(written[name]) != content(expected[name])]
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_source(command, tmp_path, capsys):
    assert command(tmp_path / "nope", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {tmp_path}/nope does not hold the source folder ")
    assert not (tmp_path / "out").exists()


@needs_sources
@pytest.mark.parametrize("readme", [None, "# My work\n"])
def test_folders_of_others_stay(command, tmp_path, capsys, readme):
    (tmp_path / "thesis.tex").write_text("years of work")
    if readme:
        (tmp_path / "README.md").write_text(readme)
    assert command(DATA, tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {tmp_path} is no sample dataset of this script; ")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
