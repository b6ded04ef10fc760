"""What a process sets once before it computes: compilation cache, memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax

from unibiomed_jax.errors import InputError

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def cache_folder(kind: str) -> Path:
    """Where things of a kind are kept between runs (`compiled`, `converted`): in the user's cache folder.

    Raises:
        InputError: the account has no home folder, as some in containers have none.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise InputError(
                "This account has no home folder to keep things in between runs; set XDG_CACHE_HOME to a "
                "folder that can be written."
            ) from None
    return Path(base).absolute() / "unibiomed_jax" / kind


@functools.cache
def prepare(platform: str | None = None) -> None:
    """Turn on the persistent compilation cache and, on a CPU, keep freed memory in the process.

    A cache folder that was already chosen (JAX_COMPILATION_CACHE_DIR) is left as it is. By default glibc
    gives every large buffer back to the kernel when it is freed, and the next call pays for it again, page by
    page: up to a third of the time of a model on a CPU. Only the heap of the main thread can keep buffers of
    more than 64 MB, so programs run on the thread that calls them; a backend that has started stays as it is.

    Args:
        platform: that computes ("cpu", "gpu", "tpu"); by default that of this process.
    """
    if not jax.config.jax_compilation_cache_dir:
        with contextlib.suppress(InputError, OSError):  # without a place for it, every run compiles anew
            folder = cache_folder("compiled")
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if sys.platform == "linux" and (platform or jax.default_backend()) == "cpu":
        mallopt = _of_glibc("mallopt")
        if mallopt is None:  # nothing to tune
            return
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
        mallopt(_M_ARENA_MAX, 1)


def release() -> None:
    """Give freed memory back to the system once, where `prepare` has this process keep it.

    After a stage that needed much and does not come again, such as loading.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of glibc; None where there is another C library."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
