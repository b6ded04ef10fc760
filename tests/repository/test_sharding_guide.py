"""docs/sharding.md: its commands are taken, its numbers are those of today."""

from __future__ import annotations

import dataclasses
import math
import re
import runpy
import shlex

import jax
import pytest
import tyro
from places import ROOT

from unibiomed_jax.cli import Command
from unibiomed_jax.commands.explain_sharding import ExplainShardingOptions, explain_sharding
from unibiomed_jax.commands.predict import PredictOptions
from unibiomed_jax.errors import InputError
from unibiomed_jax.sharding.layout import Layout, mesh_sizes, parse_mesh
from unibiomed_jax.sharding.strategies import STRATEGIES
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.start import abstract_state

GUIDE = (ROOT / "docs" / "sharding.md").read_text()
RECIPE = ROOT / "configs" / "unibiomed_1b.py"
COMMANDS = [shlex.split(line)[1:] for line in GUIDE.splitlines() if line.startswith("unibiomed ")]


@pytest.fixture(scope="module")
def recipe():
    """The published recipe and the shapes of its parameters."""
    config = dataclasses.replace(runpy.run_path(str(RECIPE))["config"], initial=None)
    return config, structure(config)[1]


def held(recipe, strategy: str, mesh: dict[str, int]) -> tuple[float, Layout, dict]:
    """MiB a chip of parameters, masters and moments."""
    config, shapes = recipe
    layout = Layout.abstractly(STRATEGIES[strategy], config.model, mesh)
    abstract = abstract_state(config, shapes, layout)
    leaves = jax.tree.leaves(abstract)
    size = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return size / 2**20, layout, abstract


def is_refused(layout: Layout, abstract: dict) -> bool:
    try:
        layout.require_useful(abstract["frozen"])
        layout.require_useful(abstract["train"].trainable, "optimizer")
    except InputError:
        return True
    return False


def test_every_strategy_is_explained():
    assert set(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)) == set(STRATEGIES)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_commands_are_taken(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = tyro.cli(Command, args=arguments)
    if isinstance(options, PredictOptions):
        assert options.strategy in STRATEGIES
    else:
        assert isinstance(options, ExplainShardingOptions) and explain_sharding(options) == 0
        assert (tmp_path / "sharding.svg").exists() == ("--svg" in arguments)


@pytest.mark.slow
def test_the_table_of_bytes_is_that_of_the_recipe(recipe):
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \| (\d+) \|$", GUIDE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [16, 64, 128, 256, 512]
    for chips, fsdp, hsdp, equal in rows:
        size, layout, abstract = held(recipe, "fsdp", {"fsdp": int(chips)})
        assert f"{size:,.0f}" == fsdp.removesuffix(", refused")
        assert is_refused(layout, abstract) == fsdp.endswith("refused")
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)) / 2**20
        assert f"{total / int(chips):.0f}" == equal
        if hsdp != "-":
            size, layout, abstract = held(recipe, "hsdp", parse_mesh(hsdp.split("`")[1]))
            assert f"{size:.0f}" == hsdp.split()[0] and not is_refused(layout, abstract)
    whole = re.search(r"With `data_parallel` it is ([\d,]+) MiB", GUIDE)[1]
    assert f"{held(recipe, 'data_parallel', {'replica': 4})[0]:,.0f}" == whole


@pytest.mark.slow
def test_a_pod_can_do_what_the_recipe_says(recipe):
    """128 samples at once, on as many chips as the configuration names."""
    lines = re.findall(r"#   ([\d, ]+?) (?:chips)? +--strategy (\w+)(?: --mesh (\S+))?", RECIPE.read_text())
    assert len(lines) == 3
    for counts, strategy, mesh in lines:
        for chips in map(int, counts.split(",")):
            sizes = mesh_sizes(parse_mesh(mesh) if mesh else None, STRATEGIES[strategy], chips)
            _, layout, abstract = held(recipe, strategy, sizes)
            layout.require_divisible(128)
            assert layout.mesh.size == chips and not is_refused(layout, abstract)
