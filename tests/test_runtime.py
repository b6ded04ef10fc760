"""What a process sets before it computes."""

import os
import platform
import subprocess
import sys

import pytest

# Counts glibc's heaps after work on all threads of the backend.
COUNT_HEAPS = """
import ctypes, sys
from unibiomed_jax import runtime
runtime.prepare()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: x + 0 * jax.lax.cumsum(jnp.outer(x, x), axis=0).sum())
x = jnp.ones(2000)
for _ in range(20):
    x = step(x)
x.block_until_ready()
libc = ctypes.CDLL("libc.so.6")
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is tuned")
def test_threads_share_the_heap_that_keeps_its_memory(tmp_path):
    report = tmp_path / "heaps.xml"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("MALLOC_ARENA_MAX", None)
    subprocess.run([sys.executable, "-c", COUNT_HEAPS, str(report)], env=environment, check=True)
    assert report.read_text().count("<heap nr=") == 1
