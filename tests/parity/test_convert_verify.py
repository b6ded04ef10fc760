"""`conversion.verify` with PyTorch at hand: the outputs of every module, and the first that diverges."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from micro_checkpoint import MICRO, micro_tensors, run_command, write_released  # noqa: E402

from unibiomed_jax.conversion import from_torch, oracles, sources, verify  # noqa: E402
from unibiomed_jax.conversion.tables.sam2 import PREFIX  # noqa: E402


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "micro"
    from_torch.convert(sources.released(MICRO), folder)
    return folder


def test_every_module_computes_what_torch_computes(converted, monkeypatch, capsys):
    assert run_command(monkeypatch, verify, converted, MICRO) == 0
    output = capsys.readouterr().out
    assert "differs" not in output and "Outputs, PyTorch's against ours" in output
    for module in ("vision_model", "mlp1", "language_model", "text_hidden_fcs", "sam2.image_encoder",
                   "sam2.sam_mask_decoder", "sam2.memory_encoder", "sam2.memory_attention"):  # fmt: skip
        assert output.count(f"│ {module} ") >= 2, f"{module} must be in both tables"


def test_a_module_that_differs_is_named(converted, tmp_path, monkeypatch):
    name = f"{PREFIX}memory_attention.layers.1.cross_attn_image.k_proj.weight"
    tensors = micro_tensors()
    tensors[name] = tensors[name] + np.float32(0.01)
    changed = write_released(tmp_path / "changed", tensors)
    checks = {part: lambda *_: iter(()) for part in oracles.CHECKS} | {"sam2": oracles.CHECKS["sam2"]}
    monkeypatch.setattr(oracles, "CHECKS", checks)
    outputs = list(oracles.compare(verify.Opened(changed), verify.Opened(converted)))
    assert [found.module for found in outputs if not found.agrees] == ["sam2.memory_attention"]
    assert all(found.error <= 1e-5 for found in outputs if found.agrees)
    differences = list(verify.compare(verify.Opened(changed), verify.Opened(converted)))
    assert [found.first.split(":")[0] for found in differences if found.first] == [name]
