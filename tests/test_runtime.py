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


@pytest.mark.parametrize("chosen", [None, "elsewhere"])
def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path, chosen):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XDG"))}
    environment |= {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / chosen)
    code = (
        "from unibiomed_jax import runtime; runtime.prepare(); import jax; "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); jax.jit(lambda x: x + 1)(1)"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    folder = tmp_path / (chosen or ".cache/unibiomed_jax/compiled")
    assert any(folder.iterdir())


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
