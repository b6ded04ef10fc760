"""Folders that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from unibiomed_jax.errors import DiskFullError, InputError

# What a full disk is called.
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends, and vanishes when it fails.

    Raises:
        InputError: `path` exists and `overwrite` is false, or its parent cannot be written.
        DiskFullError: the disk is full.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another folder or pass --overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{path} cannot be created ({error.strerror}); choose another place.") from None
    try:
        yield partial
        old = partial.with_name(f"{partial.name}.old")
        if overwrite and path.exists():
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        if old.exists():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = getattr(error, "errno", None) in NO_SPACE
        if full or "No space left on device" in str(error):
            raise DiskFullError(f"The disk of {path} is full; free some space and run again.") from None
        raise


def require_space(path: str | os.PathLike, needed: int) -> None:
    """Raise InputError unless `needed` bytes are free where `path` will be."""
    parent = next(parent for parent in Path(path).absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{path} needs {needed / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free there; free some "
            "space or choose another disk."
        )
