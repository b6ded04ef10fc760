"""What a process sets before it computes."""

import os
import platform
import subprocess
import sys

import pytest

# Prints how large the buffer of a program is, and how many pages twelve calls touch for the first time.
COUNT_FAULTS = """
import resource
from unibiomed_jax import runtime
runtime.prepare()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: x + 0 * jax.lax.cumsum(jnp.outer(x, x), axis=0).sum())
x = jnp.ones(5000)
print(step.lower(x).compile().memory_analysis().temp_size_in_bytes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for call in range(12):
    x = step(x)
x.block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is tuned")
def test_a_large_buffer_is_kept_from_call_to_call():
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    size, faults = map(int, done.stdout.split())
    assert size > 100e6
    # Taken anew at each call it would be twelve times its pages; jax 0.10 takes a second one at some call.
    assert faults < 2.5 * size / 4096
