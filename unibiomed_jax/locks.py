"""Locks: one job at a time writes into a folder, on a disk or in a bucket.

On a disk the system holds the lock of a file, and lets it go with the process. A bucket has no such thing:
there the lock is a file that says who holds it, written only where it is still what its writer saw (buckets
know such conditions), and rewritten every BEAT seconds. Who was killed writes no more: after SILENCE seconds,
by the bucket's clock, the next job takes the lock without being told. One that was thought dead and lives
finds another's name in it, and must end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from unibiomed_jax.bucket import BucketPath
from unibiomed_jax.errors import BucketError, InputError

logger = logging.getLogger(__name__)

# Seconds between two signs of life of who holds a lock in a bucket.
BEAT = 15
# Seconds without one after which it counts as dead.
SILENCE = 60
# What file systems without locks answer to one.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Lock:
    """A lock that is held."""

    def check(self) -> None:
        """Raise InputError if another job has it by now."""


@contextlib.contextmanager
def hold(path: Path, *, does: str, remedy: str) -> Iterator[Lock]:
    """Hold the lock in the file `path`, which stays; where a file system knows no locks nothing is held.

    Args:
        path: of the file; created where there is none, in a folder that is there.
        does: what whoever holds it does, for messages: "trains in runs/kidney".
        remedy: what to do about that.

    Raises:
        InputError: another job holds it.
    """
    if isinstance(path, BucketPath):
        with _BucketLock(path, does, remedy) as lock:
            yield lock
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process {does}; {remedy}.") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield Lock()


class _Found(NamedTuple):
    """What lies at a lock's place."""

    # Of the file; None: there is none.
    version: str | None
    # Who holds it, as its JSON says; None: nobody.
    holder: dict | None
    # Seconds since it was written.
    silent: float


class _BucketLock(Lock):
    def __init__(self, path: BucketPath, does: str, remedy: str):
        self.path, self.does, self.remedy = path, does, remedy
        self._me = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "id": uuid.uuid4().hex,
        }
        self._version: str | None = None
        # When it was written last, and by one thread at a time.
        self._signed = 0.0
        self._writing = threading.Lock()
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _BucketLock:
        before = None
        while True:
            found = self._look()
            if found.holder is None or found.silent >= SILENCE:
                break
            if before is not None and found.version != before.version:
                raise self._refusal(found.holder)
            if before is None:
                logger.warning(
                    "%s is held by %s; waiting for a sign of life, until there was none for %d s.",
                    self.path,
                    _name(found.holder),
                    SILENCE,
                )
            before = found
            time.sleep(min(BEAT / 3, SILENCE - found.silent))
        self._version = found.version
        if not self._write():
            raise self._refusal(self._look().holder)
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._done.set()
        if isinstance(error, BucketError):  # a bucket that is gone is not asked again
            return
        self._thread.join()
        with contextlib.suppress(Exception):  # then the next job waits for a while
            if not self._lost:
                self.path.write_if(b"", self._version)

    def check(self) -> None:
        if time.time() - self._signed >= SILENCE - BEAT:  # such as after a night's sleep
            self._sign()
        if self._lost:
            raise InputError(
                f"Another process {self.does} since this one gave no sign of life for {SILENCE} s; leave it "
                f"the folder, or stop it and run the same command again."
            )

    def _beat(self) -> None:
        """In a thread: signs of life until the lock is let go, or is another's."""
        while not self._done.wait(BEAT) and not self._lost:
            try:
                self._sign()
            except Exception as error:  # whatever its library raises: the bucket may answer the next time
                logger.warning("%s cannot be written (%s); trying again in %d s.", self.path, error, BEAT)

    def _sign(self) -> None:
        with self._writing:
            self._lost = self._lost or not self._write()

    def _look(self) -> _Found:
        mark = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        mark.touch()  # which asks the bucket what time it is
        try:
            while True:
                try:
                    version, written = self.path.version()
                    content = self.path.read_text()
                except FileNotFoundError:
                    return _Found(None, None, 0)
                if self.path.version()[0] == version:
                    break
            silent = (mark.version()[1] - written).total_seconds()
        finally:
            mark.unlink()
        return _Found(version, json.loads(content) if content else None, silent)

    def _write(self) -> bool:
        """Write the lock anew if it is what it was; whether it is ours."""
        content = json.dumps(self._me | {"sign": uuid.uuid4().hex})  # another version each time
        self.path.write_if(content.encode(), self._version)
        with contextlib.suppress(FileNotFoundError):
            # Whatever it answered: a try of which no answer came, now or at the last sign of life, may have
            # been what wrote it.
            version, _ = self.path.version()
            if self._is_mine(self.path.read_text()):
                self._version, self._signed = version, time.time()
                return True
        return False

    def _is_mine(self, content: str) -> bool:
        return bool(content) and json.loads(content).get("id") == self._me["id"]

    def _refusal(self, holder: dict | None) -> InputError:
        name = f" ({_name(holder)})" if holder else ""
        return InputError(f"Another process {self.does}{name}; {self.remedy}.")


def _name(holder: dict) -> str:
    return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
