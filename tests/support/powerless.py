"""What a test of permissions or of a full disk takes away from its own process."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Of linux/capability.h: version 3 of the call, and the rights by which root reads and writes what it may not.
_VERSION = 0x20080522
_OVERRIDES = 1 << 1 | 1 << 2


@contextmanager
def without_override() -> Iterator[None]:
    """The permissions of files count in this thread, for root as well."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root writes everywhere, and only Linux lets it do without")
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0, os.strerror(ctypes.get_errno())
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~_OVERRIDES
    assert libc.capset(header, fewer) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file can be written beyond so many bytes: what a program meets on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
