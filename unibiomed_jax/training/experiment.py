"""A Python file is a whole experiment; the command line changes any field of it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import runpy
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import tyro

from unibiomed_jax.errors import InputError
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.metrics import SCORES

# Fields of which zero or less would mean nothing.
AT_LEAST_ONE = (
    "optim.steps",
    "optim.accumulate",
    "loss.num_points",
    "loss.oversample",
    "loss.copies",
    "loss.token_chunk",
    "checkpoint.every",
    "checkpoint.keep_last",
    "log.every",
    "max_bad_steps",
)


def load_experiment(path: str, arguments: Sequence[str] = ()) -> TrainConfig:
    """The `config` that a file defines, with fields replaced as in `--optim.lr=1e-5 --seed 1`.

    Raises:
        InputError: no such file, a file without a TrainConfig named `config`, an unknown field (names the
            nearest), or a value that its field cannot have.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; give a configuration such as configs/tiny.py.")
    config = runpy.run_path(path).get("config")
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path} defines no `config = TrainConfig(...)`; see configs/tiny.py.")
    require_choices(config)
    if any(argument in ("-h", "--help") for argument in arguments):
        return tyro.cli(TrainConfig, default=config, args=arguments, prog=f"train.py {path}")
    known = field_names(config)
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name not in known and _positive(name) not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise InputError(f"There is no field {name!r}; the nearest is --{near}.")
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            config = tyro.cli(TrainConfig, default=config, args=arguments)
    except SystemExit:
        # A box with a title, the reason, and below a line where to find help.
        lines = [line.strip(" │╭╰─╮╯") for line in messages.getvalue().splitlines()]
        reason = " ".join(itertools.takewhile(bool, lines[1:]))
        raise InputError(f"The options {' '.join(arguments)} cannot be used: {reason.rstrip('.')}.") from None
    require_possible(config)
    return config


def require_possible(config: TrainConfig) -> None:
    """Refuse what would fail only after hours, or be without effect.

    Raises:
        InputError: a value that its field cannot have.
    """
    for name in AT_LEAST_ONE:
        value = functools.reduce(getattr, name.split("."), config)
        if value is not None and value < 1:
            raise InputError(f"--{name}={value} is impossible; give 1 or more.")
    if not 0 <= config.loss.importance <= 1:
        raise InputError(f"--loss.importance={config.loss.importance} is impossible; give 0 to 1.")
    if config.checkpoint.best not in SCORES:
        raise InputError(
            f"--checkpoint.best={config.checkpoint.best} is no measure of a validation in which higher is "
            f"better; give one of {', '.join(SCORES)}."
        )


def require_choices(config: object, prefix: str = "") -> None:
    """Check fields with a fixed set of values in a file; the parser of the command line checks only its own.

    Raises:
        InputError: a value that is not in the set.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, hint, value = prefix + field.name, hints[field.name], getattr(config, field.name)
        if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
            choices = ", ".join(typing.get_args(hint))
            raise InputError(f"--{name}={value} is impossible; give one of {choices}.")
        if dataclasses.is_dataclass(value):
            require_choices(value, f"{name}.")


def field_names(config: object, prefix: str = "") -> list[str]:
    """Dotted names of all fields; elements of a tuple of tables go by their number."""
    names = []
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        names.append(name)
        parts = enumerate(value) if isinstance(value, tuple) else [("", value)]
        for number, part in parts:
            if dataclasses.is_dataclass(part):
                names += field_names(part, f"{name}.{number}.".replace("..", "."))
    return names


def _positive(name: str) -> str:
    """The field that `--log.no-tensorboard` switches off."""
    *parents, last = name.split(".")
    return ".".join([*parents, last.removeprefix("no_")])


def main_arguments() -> tuple[str, list[str]]:
    """Configuration file and options of `python train.py FILE [--field=value ...]`.

    Raises:
        InputError: no file is given.
    """
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise InputError(
            "Usage: python train.py configs/tiny.py [--field=value ...]; --help after the file lists all."
        )
    return sys.argv[1], sys.argv[2:]
