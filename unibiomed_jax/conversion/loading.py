"""A checkpoint from wherever it is: a folder of either kind, or a repository of the Hugging Face hub.

What is downloaded is converted once and kept in the user's cache folder, where the next start reads it:
converted/<owner>--<name>/<commit>. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from unibiomed_jax import checkpoint, distributed, runtime
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.conversion import from_torch, hub, sources
from unibiomed_jax.errors import DiskFullError, InputError
from unibiomed_jax.files import NO_SPACE, locate

logger = logging.getLogger(__name__)


def load(source: str | Path, sharding: checkpoint.Sharding | None = None) -> checkpoint.Checkpoint:
    """Load a checkpoint onto the devices.

    Args:
        source: a converted folder, a released one (which is converted in memory), or `owner/name[@revision]`.
        sharding: where each parameter goes; see `checkpoint.load`.

    Raises:
        InputError: it is incomplete, damaged or of an unsupported kind, or cannot be downloaded.
    """
    folder, repository = fetch(source), hub.repository(source)
    if repository is None:
        return _read(folder, sharding)
    made = _made(folder)
    try:
        return _read(folder, sharding)
    except InputError as error:
        if not folder.is_relative_to(_cache()):
            raise
        logger.warning(
            "What was converted from %s is made anew, for it cannot be read: %s", repository, error
        )
    return _read(_converted(repository, instead_of=made), sharding)


def config_of(source: str | Path) -> ModelConfig:
    """The configuration of a checkpoint, without its weights.

    Raises:
        InputError: as `load`.
    """
    folder = fetch(source)
    return (
        checkpoint.read_config(folder)
        if checkpoint.is_checkpoint(folder)
        else sources.released(folder).config
    )


def fetch(source: str | Path) -> Path:
    """The folder to load: `source` itself, or what its repository holds, downloaded and converted by now.

    Raises:
        InputError: the repository cannot be downloaded, or is no UniBiomed.
        DiskFullError: the disk is full.
    """
    repository = hub.repository(source)
    return _converted(repository) if repository else locate(source)


def _read(folder: Path, sharding: checkpoint.Sharding | None) -> checkpoint.Checkpoint:
    if checkpoint.is_checkpoint(folder):
        return checkpoint.load(folder, sharding=sharding)
    return from_torch.read_released(folder, sharding)


def _cache() -> Path:
    return runtime.cache_folder("converted")


def _made(folder: Path) -> int | None:
    """What tells a folder from another one that takes its place; None: there is none."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _converted(repository: hub.Repository, *, instead_of: int | None = None) -> Path:
    """The converted checkpoint of a repository; made, if it is missing or still the damaged `instead_of`."""
    revision = hub.resolve(repository)
    parent = _cache() / repository.name.replace("/", "--")
    if _made(parent / revision.commit) not in (None, instead_of):
        return parent / revision.commit
    downloaded = hub.download(repository, revision)
    if checkpoint.is_checkpoint(downloaded):
        return downloaded
    folder = parent / downloaded.name  # a branch may have moved on meanwhile
    with _alone(folder):
        if _made(folder) in (None, instead_of):
            with distributed.apart():  # machines have caches of their own
                from_torch.convert(sources.released(downloaded), folder, overwrite=True)
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes a folder of the cache; the others find it made."""
    from huggingface_hub.utils import WeakFileLock

    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(folder.with_name(f".{folder.name}.lock")))
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFullError(f"The disk of {folder} is full; free some space and run again.") from None
            raise InputError(
                f"{folder} cannot be created ({error.strerror}); set XDG_CACHE_HOME to a folder that can be "
                "written."
            ) from None
        for left in folder.parent.glob(f".{folder.name}.partial-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield
