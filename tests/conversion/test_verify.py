"""Comparing checkpoints: agreement, the first divergence, and what cannot be compared."""

import numpy as np
import pytest
from micro_checkpoint import (
    BFLOAT16,
    MICRO,
    SMALL,
    micro_tensors,
    random_tensors,
    run_command,
    write_released,
)

from unibiomed_jax.conversion import from_torch, sources, verify
from unibiomed_jax.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def micro():
    return micro_tensors()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "micro"
    from_torch.convert(sources.released(MICRO), folder)
    return folder


def test_verify_finds_equal_checkpoints_equal(converted, monkeypatch, capsys):
    assert run_command(monkeypatch, verify, MICRO, converted, "--weights-only") == 0
    assert run_command(monkeypatch, verify, converted, converted) == 0
    output = capsys.readouterr().out
    assert "sam2.memory_encoder" in output and "differs" not in output


def test_verify_names_the_first_divergence(converted, tmp_path, micro, monkeypatch, capsys):
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    later = "text_hidden_fcs.0.bias"
    changed = {name: micro[name].copy(), later: micro[later] + 1}
    changed[name][2, 3] += 0.5
    folder = write_released(tmp_path / "changed", micro | changed)
    assert run_command(monkeypatch, verify, converted, folder, "--weights-only") == 1
    output = " ".join(capsys.readouterr().out.split())
    assert f"First divergence: {name}: 0.5 apart at [2, 3]" in output
    differences = {
        found.module: found for found in verify.compare(verify.Opened(converted), verify.Opened(folder))
    }
    assert [m for m, found in differences.items() if found.first] == ["vision_model", "text_hidden_fcs"]
    assert differences["vision_model"].largest == np.abs(changed[name] - micro[name]).max()


def test_verify_notices_formats_and_invalid_numbers(converted, tmp_path, micro):
    rounded = {name: v.astype(BFLOAT16) if name.startswith("mlp1") else v for name, v in micro.items()}
    rounded["text_hidden_fcs.2.bias"] = np.full_like(micro["text_hidden_fcs.2.bias"], np.nan)
    folder = write_released(tmp_path / "rounded", rounded)
    found = {d.module: d for d in verify.compare(verify.Opened(converted), verify.Opened(folder))}
    assert "stored as float32 and bfloat16" in found["mlp1"].first
    assert found["text_hidden_fcs"].largest == np.inf


def test_verify_refuses_different_models(converted, tmp_path):
    folder = write_released(tmp_path / "released", random_tensors(SMALL), SMALL)
    with pytest.raises(InputError, match="different models .vision"):
        list(verify.compare(verify.Opened(converted), verify.Opened(folder)))
