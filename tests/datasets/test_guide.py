"""The guide: its commands are understood, its tables are read."""

import json
import re
import shlex

import tyro
from places import ROOT
from small_datasets import save_picture, save_square, write_table

from unibiomed_jax import cli
from unibiomed_jax.conversion.options import FromTorchOptions
from unibiomed_jax.data.files import check_files
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.datasets.build import BuildOptions
from unibiomed_jax.datasets.pack import PackOptions
from unibiomed_jax.datasets.validate import ValidateOptions
from unibiomed_jax.training.experiment import load_command

GUIDE = (ROOT / "docs" / "train_on_your_data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Arguments of every command of the guide that begins with `program`."""
    found = [
        shlex.split(line, comments=True)
        for block in blocks("bash")
        for line in re.split(r"\n(?=unibiomed|python|echo)", block.replace("\\\n", " "))
    ]
    name = program.split()
    return [command[len(name) :] for command in found if command[: len(name)] == name]


def test_the_commands_of_unibiomed_are_understood():
    options = [tyro.cli(cli.Command, args=command) for command in commands("unibiomed")]
    images, volumes, check, convert, ask, pack, check_packed = options
    assert isinstance(images, BuildOptions) and images.findings == ("kidney tumor",)
    assert isinstance(volumes, BuildOptions) and volumes.window == (-160, 240)
    assert isinstance(check, ValidateOptions) and check.path == images.out
    assert isinstance(convert, FromTorchOptions) and str(convert.dst) == "runs/start"
    assert isinstance(pack, PackOptions) and pack.path == images.out and pack.out == check_packed.path
    assert ask.prompt.startswith("<image>\nPlease segment the kidney")


def test_the_commands_of_training_are_understood(tmp_path):
    dry, real, packed = (command[1:] for command in commands("python train.py"))
    (tmp_path / "empty.py").write_text(
        "from unibiomed_jax.training.config import TrainConfig\nconfig = TrainConfig()"
    )
    (_, dry), (config, real), (_, packed) = (
        load_command(str(tmp_path / "empty.py"), options) for options in (dry, real, packed)
    )
    assert dry.dry_run and packed.dry_run and not real.dry_run and config.initial == "runs/start"
    assert all((ROOT / command[0]).is_file() for command in commands("python train.py"))
    assert re.search(r"^DATASET = ", (ROOT / "configs" / "finetune.py").read_text(), re.MULTILINE)


def test_the_tables_are_read(tmp_path):
    targets, findings, volumes, captions = map(json.loads, blocks("json"))
    for folder in (tmp_path, tmp_path / "train"):
        save_picture(folder / "P1_03.png", size=(512, 512))
    save_square(tmp_path / "train_mask" / "P1_03_kidney+tumor.png", size=(512, 512))
    save_picture(tmp_path / "case1" / "case1-001.png")
    save_square(tmp_path / "mask" / "case1" / "case1-001_liver.png")
    for kind, table in (
        (Kind.SEGMENTATION, targets),
        (Kind.DISEASE, targets),
        (Kind.REGION, targets),
        (Kind.SEQUENCE, volumes),
        (Kind.VQA, findings),
        (Kind.REPORT, findings),
        (Kind.CAPTION, captions),
    ):
        write_table(tmp_path / "table.json", table)
        records = read_dataset(DatasetConfig(kind, str(tmp_path), annotations="table.json"))
        check_files(records)
        assert len(records) == 1
