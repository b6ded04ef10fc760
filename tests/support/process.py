"""One process of a job that the tests start: `python process.py train.py ...`.

It waits seconds instead of minutes for the others (ARRIVAL, if set) and for who held a lock, and keeps its
compiled programs: JAX keeps those of the first process alone, though on a CPU they are no use to the others.
"""

import os
import runpy
import sys

from jax._src import compiler
from jax._src import distributed as jax_distributed

from unibiomed_jax import distributed, locks

distributed._GATHERED = 1 << 13  # so that large arrays are gathered in parts, too
distributed.ARRIVAL, distributed.HEARTBEAT = int(os.environ.get("ARRIVAL", "60")), 10
locks.BEAT, locks.SILENCE = 1, 8
write = compiler._cache_write


def write_own(*arguments, **named):
    state = jax_distributed.global_state
    own, state.process_id = state.process_id, 0
    try:
        write(*arguments, **named)
    finally:
        state.process_id = own


compiler._cache_write = write_own
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
