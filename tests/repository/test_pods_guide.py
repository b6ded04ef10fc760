"""docs/tpu_pods.md: what of it can be run without a pod."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess

import pytest
import tyro
from places import ROOT
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax import cli, distributed
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.sharding.layout import Layout, parse_mesh
from unibiomed_jax.sharding.strategies import find_strategy
from unibiomed_jax.training.experiment import load_command
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.start import abstract_state

GUIDE = (ROOT / "docs" / "tpu_pods.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
# One command a line.
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
TRAINING = [line.removesuffix("&& break") for line in LINES if line.startswith(("python train.py", "srun "))]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Where the lines of the page are run: a checkout in which the data is."""
    for name in ("data/mine", "runs/start"):
        (tmp_path / name).mkdir(parents=True)
    save_picture(tmp_path / "data/mine/train/0.png")
    save_square(tmp_path / "data/mine/train_mask/0_liver.png")
    write_table(tmp_path / "data/mine/train.json", coco_table(1))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    def split(line: str) -> tuple[str, list[str]]:
        file, *options = shlex.split(line.partition("python train.py")[2])
        return file, options

    return split


def test_all_its_blocks_are_commands_of_a_shell():
    assert len(BLOCKS) > 8
    for block in BLOCKS:
        result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert result.returncode == 0, block + result.stderr


def test_its_commands_are_understood():
    commands = [shlex.split(line)[1:] for line in LINES if line.startswith("unibiomed ")]
    assert {command[0] for command in commands} == {"data", "convert", "predict"}
    for command in commands:
        tyro.cli(cli.Command, args=command)


@pytest.mark.parametrize("line", TRAINING)
def test_its_trainings_are_understood(line, arguments):
    config, acts = load_command(*arguments(line))
    assert config.initial and config.folder
    given = distributed._given(acts)
    assert (given is not None) == ("--coordinator" in line)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in TRAINING if "--mesh" in line])
def test_its_meshes_are_of_use_to_the_model(line, arguments):
    config, _ = load_command(*arguments(line))
    config = dataclasses.replace(config, initial=None, model=ModelConfig())
    layout = Layout.abstractly(find_strategy(config.strategy), config.model, parse_mesh(config.mesh))
    layout.require_divisible(config.data.batch_size)
    abstract = abstract_state(config, structure(config)[1], layout)
    layout.require_useful(abstract["frozen"])
    layout.require_useful(abstract["train"].trainable, "optimizer")


def test_what_it_says_of_messages_is_what_is_said(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [{"seed": "42"}, {"seed": "1"}])
    with pytest.raises(InputError) as said:
        distributed.require_equal("configuration", {"seed": 42})
    row = "Process 1 has another configuration (program, data set) than process 0"
    assert row in GUIDE and str(said.value).startswith(row.replace(" (program, data set)", ""))
    assert f"did not come within {distributed.ARRIVAL} s" in GUIDE
