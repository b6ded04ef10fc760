"""How a program ends: the one place where errors become a sentence and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console

from unibiomed_jax import distributed
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import NO_SPACE, shown

# Exit codes. (The command-line parser ends with IMPOSSIBLE, too.)
DONE, FAILED_IN_PART, IMPOSSIBLE, INTERRUPTED = 0, 1, 2, 130


def run(program: Callable[[], int | None]) -> int:
    """Run a program; what its user must put right becomes one line on stderr.

    Returns:
        The exit code: what the program returned (None: DONE), IMPOSSIBLE, or INTERRUPTED.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal cannot show is written as an escape
            stream.reconfigure(errors="backslashreplace")
    code, gone = IMPOSSIBLE, False
    try:
        done = program() or DONE
        distributed.finish()
        return done
    except (BucketError, InputError) as error:
        sentence, gone = str(error), isinstance(error, BucketError)
    except KeyboardInterrupt as error:
        sentence, code = str(error) or "Interrupted.", INTERRUPTED
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            sentence = "The disk is full; free some space and run the same command again."
        elif isinstance(error, OSError) and error.filename is not None:
            why = f"{error.filename} cannot be used ({error.strerror})"
            sentence = f"{why}; mend that, or choose another place."
        else:
            stopped = isinstance(error, SystemExit)
            reason = "it was stopped." if stopped else f"{type(error).__name__}: {error}"
            code = 1  # as Python does
            if stopped:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            with distributed.ending(reason, code):
                raise
    with distributed.ending(sentence, code):
        _say(sentence)
    if gone:  # threads of Orbax would ask the bucket for minutes more
        distributed.leave(code)
    return code


def main(options: type, command: Callable[[Any], int | None], arguments: Sequence[str] | None = None) -> None:
    """Run a command as a program of its own: its options from the command line, its end as an exit code."""
    sys.exit(run(lambda: command(tyro.cli(options, args=arguments))))


def _say(sentence: str) -> None:
    stderr = Console(stderr=True)
    stderr.print(f"Error: {shown(sentence)}", style="red", markup=False, highlight=False, soft_wrap=True)
