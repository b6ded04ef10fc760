"""The one exception that means: what was given cannot be used."""


class InputError(ValueError):
    """Something the user gave (a file, a prompt, a mask, a checkpoint) cannot be used.

    The message is a single sentence that names the offender and the remedy; the command line prints it
    without a traceback and exits with a code other than zero.
    """


class DiskFullError(InputError):
    """Nothing more can be written there."""
