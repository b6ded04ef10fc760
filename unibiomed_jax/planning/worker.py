"""Compiles one case in a process of its own, so that several compile beside each other: see `find_all`."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unibiomed_jax.errors import InputError
from unibiomed_jax.planning.facts import Facts, find, look
from unibiomed_jax.planning.programs import Case
from unibiomed_jax.planning.topologies import find_topology, require_compiler

# The most memory that a compilation was seen to take, GiB; unibiomed-1b under FSDP.
GIB_OF_ONE = 6


def find_all(cases: Sequence[Case], folder: Path, memory: float) -> list[Facts | InputError]:
    """The facts of all cases; what cannot be as the error that says why.

    Args:
        cases: to compile, where they were not compiled before.
        folder: where facts and texts of programs are kept.
        memory: GiB that the processes may take together; as many run beside each other as fit, at least one.
    """
    workers = max(1, int(memory // GIB_OF_ONE))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda case: _find_apart(case, folder), cases))


def _find_apart(case: Case, folder: Path) -> Facts | InputError:
    try:
        require_compiler(find_topology(case.topology).chip)
        found = look(case, folder)
    except InputError as error:
        return error
    if found is not None:
        return found
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((case, folder)),
        capture_output=True,
        env=environment,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{case.title} on {case.topology}: {result.stderr.decode()[-2000:]}")
    said = json.loads(result.stdout.splitlines()[-1])
    found = look(case, folder)
    return InputError(said["impossible"]) if found is None else found


def main() -> None:
    case, folder = pickle.load(sys.stdin.buffer)
    said = {}
    try:
        find(case, folder)
    except InputError as error:
        said = {"impossible": str(error)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
