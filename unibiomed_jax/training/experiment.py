"""A Python file is a whole experiment; the command line changes any field of it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from unibiomed_jax.config.fields import require_limits, require_type, unknown_field
from unibiomed_jax.distributed import Processes
from unibiomed_jax.errors import InputError
from unibiomed_jax.training.config import Acts, TrainConfig
from unibiomed_jax.training.validation import SCORES


@dataclasses.dataclass(frozen=True)
class _CommandLine:
    """What the command line sets: the experiment's fields and the acts, without a prefix."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    acts: Annotated[Acts, tyro.conf.arg(name="")]


def load_experiment(path: str, arguments: Sequence[str] = ()) -> TrainConfig:
    """The `config` that a file defines, with fields replaced as in `--optim.lr=1e-5 --seed 1`.

    Raises:
        InputError: no such file, a mistake in it, an unknown field (names the nearest), or a value that its
            field cannot have.
    """
    return load_command(path, arguments)[0]


def load_command(path: str, arguments: Sequence[str] = ()) -> tuple[TrainConfig, Acts]:
    """As `load_experiment`, and what else the arguments ask for.

    Raises:
        InputError: as `load_experiment`.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        return show_help(path, arguments)
    given = _CommandLine(read_experiment(path), Acts())
    known = [*field_names(given.config), *field_names(given.acts)]
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name not in known and _positive(name) not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise InputError(f"There is no field {name!r}; the nearest is --{near}.")
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            given = tyro.cli(_CommandLine, default=given, args=arguments)
    except SystemExit:
        # A box with a title, the reason, and below a line where to find help.
        lines = [line.strip(" │╭╰─╮╯") for line in messages.getvalue().splitlines()]
        reason = " ".join(itertools.takewhile(bool, lines[1:]))
        raise InputError(f"The options {' '.join(arguments)} cannot be used: {reason.rstrip('.')}.") from None
    require_possible(given.config)
    return given.config, given.acts


def processes_of(arguments: Sequence[str]) -> Processes:
    """Where the processes of a job meet; of what is wrong in the arguments `load_command` speaks."""
    if any(argument in ("-h", "--help") for argument in arguments):
        return Processes()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return tyro.cli(Processes, args=arguments, return_unknown_args=True)[0]
    return Processes()


def show_help(path: str, arguments: Sequence[str]) -> NoReturn:
    """Print all options and exit, also when the file cannot be used (its data is not there yet, say)."""
    try:
        config, about = read_experiment(path), None
    except InputError as error:
        config, about = TrainConfig(), f"These are not the defaults of {path}, which cannot be used: {error}"
    given = _CommandLine(config, Acts())
    tyro.cli(_CommandLine, default=given, args=arguments, prog=f"train.py {path}", description=about)


def read_experiment(path: str) -> TrainConfig:
    """The `config` that a file defines.

    Raises:
        InputError: no such file, whatever goes wrong in it, or a value that is not of its field's type.
    """
    if not Path(path).is_file():
        raise InputError(
            f"{path} is not a file; give a configuration such as configs/unibiomed_tiny/1_base.py."
        )
    try:
        config = runpy.run_path(path).get("config")
    except InputError:
        raise
    except Exception as error:
        raise _mistake(path, error) from error
    if not isinstance(config, TrainConfig):
        raise InputError(
            f"{path} defines no `config = TrainConfig(...)`; see configs/unibiomed_tiny/1_base.py."
        )
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
    require_limits(config, "--")
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
            "Usage: python train.py configs/unibiomed_tiny/1_base.py [--field=value ...]; --help after the "
            "file lists all."
        )
    return sys.argv[1], sys.argv[2:]
