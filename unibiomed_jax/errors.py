"""Errors that a user can put right: what was given cannot be used."""


class InputError(ValueError):
    """Something the user gave (a file, a prompt, a mask, a checkpoint) cannot be used.

    The message is a single sentence that names the offender and the remedy; the command line prints it
    without a traceback and exits with a code other than zero.
    """


class DamagedError(InputError):
    """A file is broken, as against one that is of another kind than is looked for."""


class DiskFullError(InputError):
    """Nothing more can be written there."""


class BucketError(Exception):
    """A bucket refuses, or does not answer; no file in it is to blame.

    The message is a sentence as that of InputError, and has no words of the bucket's in it: they may hold
    credentials. Who passes over files that cannot be read does not pass over this.
    """
