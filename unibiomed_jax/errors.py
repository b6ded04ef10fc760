"""The one exception that means: what was given cannot be used."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave (a file, a prompt, a mask, a checkpoint) cannot be used.

    The message is a single sentence that names the offender and the remedy; the command line prints it
    without a traceback and exits with a code other than zero.
    """


class DiskFullError(InputError):
    """Nothing more can be written there."""


def exit_code(program: Callable[[], None]) -> int:
    """Run a program: 0, or 2 after one line on stderr for what its user must put right."""
    try:
        program()
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0
