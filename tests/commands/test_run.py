"""How a program ends: a sentence and an exit code."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys

import pytest

from unibiomed_jax.commands.run import DONE, FAILED_IN_PART, IMPOSSIBLE, INTERRUPTED, main, run
from unibiomed_jax.errors import DiskFullError, InputError

FULL = "Error: The disk is full; free some space and run the same command again.\n"


def raising(error: BaseException):
    def program():
        raise error

    return program


def test_exit_codes_are_those_that_are_documented():
    assert (DONE, FAILED_IN_PART, IMPOSSIBLE, INTERRUPTED) == (0, 1, 2, 130)


@pytest.mark.parametrize(
    ("returned", "code"), [(None, 0), (DONE, 0), (FAILED_IN_PART, 1), (IMPOSSIBLE, 2), (INTERRUPTED, 130)]
)
def test_what_a_program_returns_is_how_it_ends(returned, code, capsys):
    assert run(lambda: returned) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "sentence",
    [
        "a.png does not exist; check the path.",
        "[bold]a[/bold] [x].png is no image",  # what looks like markup is part of a name
        "a" * 300 + " " + "b" * 300,  # not wrapped
    ],
)
@pytest.mark.parametrize("kind", [InputError, DiskFullError])
def test_what_cannot_be_used_is_one_line(capsys, kind, sentence):
    assert run(raising(kind(sentence))) == IMPOSSIBLE
    assert capsys.readouterr() == ("", f"Error: {sentence}\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
@pytest.mark.parametrize("name", [(), ("out/answer.json",)])
def test_a_full_disk_is_called_so(capsys, number, name):
    assert run(raising(OSError(number, os.strerror(number), *name))) == IMPOSSIBLE
    assert capsys.readouterr() == ("", FULL)


def test_a_file_that_cannot_be_used_is_named(tmp_path, capsys):
    missing = tmp_path / "no [such] file"
    assert run(lambda: missing.read_text()) == IMPOSSIBLE
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1
    assert found.err.startswith(f"Error: {missing} cannot be used (No such file or directory); ")
    assert run(lambda: tmp_path.read_bytes()) == IMPOSSIBLE
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path} cannot be used (Is a directory); ")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError("no number"), RuntimeError("a bug"), KeyError(1)],
)
def test_what_no_user_can_put_right_keeps_its_traceback(capsys, error):
    with pytest.raises(type(error)) as raised:
        run(raising(error))
    assert raised.value is error and capsys.readouterr() == ("", "")


def test_an_interruption_is_no_failure_of_the_program(capsys):
    assert run(raising(KeyboardInterrupt())) == INTERRUPTED
    assert capsys.readouterr() == ("", "Error: Interrupted.\n")


@dataclasses.dataclass(frozen=True)
class Options:
    code: int
    error: bool = False


def end(options: Options) -> int:
    if options.error:
        raise InputError("This cannot be used.")
    return options.code


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--code", "0"], DONE),
        (["--code", "1"], FAILED_IN_PART),
        (["--code", "0", "--error"], IMPOSSIBLE),
        (["--code", "one"], IMPOSSIBLE),
        ([], IMPOSSIBLE),
    ],
)
def test_a_command_as_a_program_of_its_own(capsys, arguments, code):
    with pytest.raises(SystemExit) as ended:
        main(Options, end, arguments)
    assert ended.value.code == code
    if "--error" in arguments:
        assert capsys.readouterr() == ("", "Error: This cannot be used.\n")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("InputError('a.png is empty.')", 2, "Error: a.png is empty."),
        ("OSError(28, 'No space left on device')", 2, FULL.strip()),
        ("KeyboardInterrupt", 130, "Error: Interrupted."),
    ],
)
def test_a_process_ends_without_a_traceback(raised, code, said):
    program = f"""
from unibiomed_jax.commands.run import main
from unibiomed_jax.errors import InputError
def command(options):
    raise {raised}
main(dict[str, str], command)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", said + "\n")
