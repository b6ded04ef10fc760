"""The command line as a whole: its commands, and what it takes to list them."""

from __future__ import annotations

import importlib
import subprocess
import sys
import typing

import pytest

from unibiomed_jax import cli


def options_of(command) -> set[type]:
    """All options that a union of commands, and of unions of them, is made of."""
    parts = typing.get_args(command) if not isinstance(command, type) else ()
    if not parts:
        return {command} if isinstance(command, type) else set()
    return set().union(*map(options_of, parts))


def test_help_lists_the_commands_without_starting_jax(unibiomed):
    assert {"predict", "convert", "data", "eval"} <= set(unibiomed("--help").stdout.split())
    assert {"build", "validate"} <= set(unibiomed("data", "--help").stdout.split())
    assert {"from-torch", "to-torch", "verify"} <= set(unibiomed("convert", "--help").stdout.split())
    look = "import sys, unibiomed_jax.cli; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_every_command_has_a_function():
    assert options_of(cli.Command) == set(cli.PLACES)
    for module, name in cli.PLACES.values():
        assert callable(getattr(importlib.import_module(f"unibiomed_jax.commands.{module}"), name))


@pytest.mark.parametrize(
    "arguments", [(), ("predcit",), ("predict",), ("data", "validate", "a", "--shwo", "1")]
)
def test_what_the_parser_refuses_ends_as_what_cannot_be_done(unibiomed, arguments):
    run = unibiomed(*arguments)
    assert run.returncode == 2 and "Traceback" not in run.stderr


def test_eval_scores_unless_something_else_is_said():
    assert type(cli.parse(["eval", "--out", "run"])) is cli.EvalOptions
    assert type(cli.parse(["eval", "run", "--out", "run"])) is cli.EvalOptions
    assert type(cli.parse(["eval", "compare", "a", "b"])) is cli.CompareOptions
    assert type(cli.parse(["eval", "--list"])) is type(cli.parse(["eval", "list"])) is cli.ListOptions
    released = ["eval", "reproduce", "--checkpoint", "released", "--data", "Biomed"]
    assert type(cli.parse(released)) is cli.ReproduceOptions
