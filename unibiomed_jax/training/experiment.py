"""A Python file is a whole experiment; the command line changes any field of it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import math
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from unibiomed_jax.config import require_type, unknown_field
from unibiomed_jax.errors import InputError
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.metrics import SCORES

# What numbers may be: in words, as a test (which NaN fails), and of which fields.
RANGES = (
    (
        "1 or more",
        lambda value: 1 <= value < math.inf,
        (
            "optim.steps",
            "optim.accumulate",
            "loss.num_points",
            "loss.oversample",
            "loss.copies",
            "loss.token_chunk",
            "checkpoint.every",
            "checkpoint.keep_last",
            "log.every",
            "log.validate_batches",
            "max_bad_steps",
        ),
    ),
    (
        "0 or more",
        lambda value: 0 <= value < math.inf,
        (
            "optim.weight_decay",
            "loss.mask_weight",
            "loss.dice_weight",
            "loss.masks_from",
            "lora.rank",
            "checkpoint.keep_best",
            "log.validate_every",
            "log.overlays",
        ),
    ),
    (
        "a number above 0",
        lambda value: 0 < value < math.inf,
        ("optim.lr", "optim.eps", "optim.clip", "lora.alpha"),
    ),
    ("0 to 1", lambda value: 0 <= value <= 1, ("optim.warmup_start", "loss.importance")),
    (
        "0 to less than 1",
        lambda value: 0 <= value < 1,
        (
            "optim.warmup",
            "optim.beta1",
            "optim.beta2",
            "optim.ema",
            "lora.dropout",
            "model.vision.drop_path_rate",
        ),
    ),
    ("0 to 4294967295", lambda value: 0 <= value < 2**32, ("seed",)),
)


def load_experiment(path: str, arguments: Sequence[str] = ()) -> TrainConfig:
    """The `config` that a file defines, with fields replaced as in `--optim.lr=1e-5 --seed 1`.

    Raises:
        InputError: no such file, a mistake in it, an unknown field (names the nearest), or a value that its
            field cannot have.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        return show_help(path, arguments)
    config = read_experiment(path)
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


def show_help(path: str, arguments: Sequence[str]) -> NoReturn:
    """Print all options and exit, also when the file cannot be used (its data is not there yet, say)."""
    try:
        config, about = read_experiment(path), None
    except InputError as error:
        config, about = TrainConfig(), f"These are not the defaults of {path}, which cannot be used: {error}"
    tyro.cli(TrainConfig, default=config, args=arguments, prog=f"train.py {path}", description=about)


def read_experiment(path: str) -> TrainConfig:
    """The `config` that a file defines.

    Raises:
        InputError: no such file, whatever goes wrong in it, or a value that is not of its field's type.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; give a configuration such as configs/tiny.py.")
    try:
        config = runpy.run_path(path).get("config")
    except InputError:
        raise
    except Exception as error:
        raise _mistake(path, error) from error
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path} defines no `config = TrainConfig(...)`; see configs/tiny.py.")
    require_type(TrainConfig, config, f"{path}: config")
    return config


def _mistake(path: str, error: Exception) -> InputError:
    """An exception of a configuration as a sentence that says where it was raised."""
    here = Path(path).resolve().parent  # files that build on one another lie side by side
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    frames = [frame for frame in frames if not frame[0].startswith("<")]  # code without a file
    if isinstance(error, SyntaxError):
        frames.append((error.filename or path, error.lineno))
    inside = [frame for frame in frames if Path(frame[0]).resolve().parent == here]
    file, line = inside[-1] if inside else (path, None)
    where = file if line is None else f"{file}, line {line}"
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    tables = {table.__name__: table for table in _tables(TrainConfig)}
    if unknown and unknown[1] in tables:
        return unknown_field(tables[unknown[1]], unknown[2], f"{unknown[1]} ({where})")
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(f"{where} cannot be used ({reason}); correct it.")


def _tables(hint) -> Iterator[type]:
    """The dataclasses of which a configuration is made."""
    if dataclasses.is_dataclass(hint):
        yield hint
    inner = typing.get_type_hints(hint).values() if dataclasses.is_dataclass(hint) else typing.get_args(hint)
    for part in inner:
        yield from _tables(part)


def require_possible(config: TrainConfig) -> None:
    """Refuse what would fail only after hours, or be without effect.

    Raises:
        InputError: a value that its field cannot have.
    """
    for words, possible, names in RANGES:
        for name in names:
            value = functools.reduce(getattr, name.split("."), config)
            if value is not None and not possible(value):
                raise InputError(f"--{name}={value} is impossible; give {words}.")
    if not config.data.training:
        raise InputError(
            "--data.training=False would end the training after one epoch; leave it out, and list in "
            "`validation` what is only measured."
        )
    if config.checkpoint.best not in SCORES:
        raise InputError(
            f"--checkpoint.best={config.checkpoint.best} is no measure of a validation in which higher is "
            f"better; give one of {', '.join(SCORES)}."
        )


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
