"""What `unibiomed explain-sharding` says, for four strategies on two meshes each.

The dumps are in tests/files/sharding; after a change that is meant:
python tests/commands/test_explain_sharding.py
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from places import FILES

from unibiomed_jax.commands.explain_sharding import (
    ExplainShardingOptions,
    explain_sharding,
    lines,
    shapes,
)
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.sharding.layout import Layout, parse_mesh
from unibiomed_jax.sharding.strategies import STRATEGIES

DUMPS = FILES / "sharding"
CASES = {
    "fsdp": ("fsdp=8", "fsdp=64"),
    "hsdp": ("replica=2,fsdp=4", "replica=4,fsdp=64"),
    "fsdp_tensor": ("fsdp=4,tensor=2", "fsdp=32,tensor=2"),
    "sequence": ("fsdp=4,sequence=2", "fsdp=8,sequence=8"),
}
PAIRS = [(strategy, mesh) for strategy, meshes in CASES.items() for mesh in meshes]


def dump(strategy: str, mesh: str) -> str:
    layout = Layout.abstractly(STRATEGIES[strategy], ModelConfig(), parse_mesh(mesh))
    parameters = shapes(ModelConfig(), "weights", lora_rank=128)
    return "\n".join(lines(layout, ModelConfig(), parameters, "weights")) + "\n"


@pytest.mark.parametrize(("strategy", "mesh"), PAIRS)
def test_nothing_is_divided_otherwise_than_recorded(strategy, mesh):
    """Renew the files as the docstring above says."""
    assert dump(strategy, mesh) == (DUMPS / f"{strategy}-{mesh}.txt").read_text()


def test_the_command_prints_every_parameter_and_draws(capsys, tmp_path):
    picture = tmp_path / "picture.svg"
    options = ExplainShardingOptions(("fsdp_tensor",), ("fsdp=4,tensor=2",), lora_rank=128, svg=picture)
    assert explain_sharding(options) == 0
    said = capsys.readouterr().out
    assert said == dump("fsdp_tensor", "fsdp=4,tensor=2")
    assert "up_proj.lora.b [layer, rank, mlp/tensor+fsdp] 24x128x608 a device" in said
    assert "gate_proj.kernel [layer, embed, mlp/tensor+fsdp] 24x896x608 a device, 26,148,864 bytes" in said
    assert "norm1.scale [layer, -] 24x1024 a device, 49,152 bytes; whole: a vector" in said
    assert "(queries) [batch/fsdp, tokens, heads/tensor, -] 1x2048x7x64 a device" in said
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_several_strategies_are_drawn_on_one_page(capsys, tmp_path):
    picture = tmp_path / "picture.svg"
    options = ExplainShardingOptions(("fsdp", "hsdp"), ("fsdp=8", "replica=2,fsdp=4"), svg=picture)
    assert explain_sharding(options) == 0
    said = capsys.readouterr().out
    assert "fsdp, fsdp=8:\n" in said and "hsdp, replica=2,fsdp=4:\n" in said and ".lora." not in said
    page = ElementTree.parse(picture).getroot()
    titles = [group[0].text for group in page]
    assert [title.split(", unibiomed")[0] for title in titles] == ["fsdp, fsdp=8", "hsdp, replica=2,fsdp=4"]
    with pytest.raises(InputError, match="2 strategies and 1 meshes"):
        explain_sharding(ExplainShardingOptions(("fsdp", "hsdp"), ("fsdp=8",)))


@pytest.mark.parametrize(
    ("strategy", "mesh", "model", "sentence"),
    [
        ("fsbp", "fsdp=4", "unibiomed-1b", "Unknown sharding strategy 'fsbp'"),
        ("fsdp", "fsdp:4", "unibiomed-1b", "cannot be read at 'fsdp:4'"),
        ("fsdp", "fsdp=4,tensor=2", "unibiomed-1b", "tensor=2, but the strategy divides nothing"),
        ("fsdp_tensor", "fsdp=2,tensor=4", "unibiomed-1b", "14 heads of"),
        ("fsdp", "fsdp=512", "unibiomed-1b", "stay whole on every device"),
        ("fsdp_tensor", "fsdp=2,tensor=8", "unibiomed-7b", "28 heads of .* the nearest that does is 4"),
    ],
)
def test_what_cannot_be_is_one_sentence(strategy, mesh, model, sentence):
    with pytest.raises(InputError, match=sentence):
        explain_sharding(ExplainShardingOptions((strategy,), (mesh,), model))


def test_wider_models_are_explained(capsys):
    options = ExplainShardingOptions(("fsdp_tensor",), ("fsdp=32,tensor=8",), "unibiomed-14b")
    assert explain_sharding(options) == 0
    assert "keys, values) [batch/fsdp, -, kv_heads/tensor, -] 1x2048x1x128" in capsys.readouterr().out


if __name__ == "__main__":
    for pair in PAIRS:
        (DUMPS / "{}-{}.txt".format(*pair)).write_text(dump(*pair))
