"""The conversion as it is called: `unibiomed convert` anywhere, `python -m convert...` in a checkout."""

import importlib.util
import runpy
import subprocess
import sys

import numpy as np
import pytest
from micro_checkpoint import MICRO, SMALL, micro_tensors, random_tensors, write_released
from places import ROOT

from unibiomed_jax import checkpoint, cli

COMMANDS = ("from-torch", "to-torch", "verify")


@pytest.fixture(params=["unibiomed convert", "python -m convert"])
def call(request, monkeypatch):
    """`call(command, *arguments)`: its exit code."""

    def run(name, *arguments):
        own = ["unibiomed", "convert", name] if request.param.startswith("unibiomed") else [name]
        monkeypatch.setattr("sys.argv", [*own, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            if own[1:]:
                cli.main()
            else:
                runpy.run_module(f"convert.{name.replace('-', '_')}", run_name="__main__")
        return end.value.code

    return run


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden checkpoint, converted by a process of its own as the documentation writes it."""
    folder = tmp_path_factory.mktemp("commands") / "converted"
    done = subprocess.run(
        [sys.executable, "-m", "convert.from_torch", str(MICRO), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("Converted 425 tensors"), done.stderr
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_each_explains_itself(call, capsys, name):
    assert call(name, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    expected = {"from-torch": ("PATH PATH", "--base", "--keep-lora", "--lora-alpha", "--overwrite"),
                "to-torch": ("PATH PATH", "--adapter", "--overwrite"),
                "verify": ("PATH PATH", "--weights-only")}  # fmt: skip
    for words in expected[name]:
        assert words in said, words


def test_there_and_back_and_both_are_the_same(call, converted, tmp_path, capsys):
    assert call("from-torch", MICRO, tmp_path / "again") == 0
    assert checkpoint.read_manifest(tmp_path / "again").hash == checkpoint.read_manifest(converted).hash
    assert call("to-torch", tmp_path / "again", tmp_path / "back") == 0
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (MICRO / weights).read_bytes()
    assert call("verify", tmp_path / "back", tmp_path / "again", "--weights-only") == 0
    said = capsys.readouterr()
    assert "Converted 425 tensors" in said.out and "Wrote 425 tensors" in said.out and not said.err


def test_verify_ends_with_1_where_weights_differ(call, converted, tmp_path, capsys):
    name = "mlp1.0.weight"
    tensors = micro_tensors()
    changed = write_released(tmp_path / "changed", tensors | {name: tensors[name] + np.float32(0.25)})
    assert call("verify", changed, converted, "--weights-only") == 1
    said = capsys.readouterr()
    assert f"First divergence: {name}: 0.25 apart" in said.out and not said.err


def test_what_cannot_be_done_ends_with_2_and_one_line(call, converted, tmp_path, capsys):
    other = write_released(tmp_path / "other", random_tensors(SMALL), SMALL)
    for name, a, b, said in (
        ("from-torch", tmp_path / "nowhere", tmp_path / "out", "nowhere is not a folder"),
        ("to-torch", tmp_path / "nowhere", tmp_path / "out", "nowhere is not a complete checkpoint"),
        ("verify", tmp_path / "nowhere", converted, "nowhere is not a folder"),
        ("verify", other, converted, "hold different models"),
    ):
        assert call(name, a, b) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("Error: ") and said in line
        assert not (tmp_path / "out").exists()


def test_an_unknown_option_ends_with_2(call, converted, capsys):
    assert call("verify", converted, converted, "--weightsonly") == 2
    assert "--weightsonly" in capsys.readouterr().err


def test_without_torch_the_weights_are_compared_and_it_is_said(call, converted, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert call("verify", MICRO, converted) == 0
    said = capsys.readouterr().out
    assert "Outputs are not compared: pip install 'unibiomed-jax[parity]'" in said
    assert "vision_model" in said and "Outputs, PyTorch's" not in said
