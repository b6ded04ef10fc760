"""A job of many processes: how they find each other, agree, say what went wrong, and end together.

Every function is right in a job of one process, too. Those that talk are called by every process in the same
order; what they exchange are JSON values, through JAX's coordination service and not through devices.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from unibiomed_jax.errors import BucketError, InputError

if TYPE_CHECKING:  # JAX starts only when it is needed
    import jax

# Seconds in which all processes must have arrived.
ARRIVAL = 110
# Seconds without a sign of life after which a process counts as dead, and all others end.
HEARTBEAT = 60
# Seconds that the first process stays, for the others to hear why it ends: what they hear comes from it.
_FAREWELL = 2
# Milliseconds that one question to the coordination service takes at most; signals are heard in between.
_PATIENCE = 2_000
_ENDING = "unibiomed/ending"
# With it the first process begins its answer to one that arrives; what else may listen there does not.
_ANSWER = b"unibiomed: "
_rounds = itertools.count()
# None: alone.
_joined: _Joined | None = None
# Who holds it says why this process ends; there is one reason.
_last_words = threading.Lock()
# Bytes of an array that are gathered at once.
_GATHERED = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Where the processes of a job meet; on a TPU pod and under SLURM they know by themselves."""

    # Address of the first process, HOST:PORT with a free port.
    coordinator: str | None = None
    # How many processes the job has.
    processes: int | None = None
    # Which of them this is, from 0.
    process: int | None = None


class _Job(NamedTuple):
    """`Processes`, complete."""

    host: str
    port: int
    processes: int
    process: int
    # Devices of the machine that are this process's own; None: all.
    devices: list[int] | None = None


class _Joined(NamedTuple):
    """The job that this process belongs to."""

    job: _Job
    # JAX's client of the coordination service.
    client: Any
    # Hears when another process fails.
    listener: threading.Thread


def join(options: Processes) -> None:
    """Become one of the processes of a job, before anything starts JAX's devices; alone, nothing happens.

    Raises:
        InputError: the options do not describe a process of a job, or a process is missing.
    """
    global _joined
    job = _given(options) or _surrounding()
    if job is None:
        return
    _meet(job)
    import jax
    from jax._src.distributed import global_state

    # Its handler of SIGTERM would take the place of ours (`training.signals`).
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{job.host}:{job.port}",
        job.processes,
        job.process,
        local_device_ids=job.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=ARRIVAL,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )
    client = global_state.client
    listener = threading.Thread(target=_listen, args=(job, client), daemon=True)
    listener.start()
    _joined = _Joined(job, client, listener)


def _given(options: Processes) -> _Job | None:
    """The job that the options describe; None if there are none."""
    values = (options.coordinator, options.processes, options.process)
    if values == (None, None, None):
        return None
    if None in values:
        raise InputError("--coordinator, --processes and --process belong together; give all three.")
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            f"--coordinator={options.coordinator} is no HOST:PORT; give the address of the first process, "
            "such as 10.0.0.1:8476."
        )
    if not 0 <= options.process < options.processes:
        raise InputError(
            f"--process={options.process} is none of --processes={options.processes}; count them from 0 to "
            f"{max(options.processes - 1, 0)}."
        )
    return _Job(host, int(port), options.processes, options.process) if options.processes > 1 else None


def _surrounding() -> _Job | None:
    """The job of the TPU pod or of the SLURM step in which this process runs."""
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, SlurmCluster

    for cluster in (GceTpuCluster, GkeTpuCluster, SlurmCluster):
        if not cluster.is_env_present() or cluster.get_process_count() == 1:
            continue
        address = cluster.get_coordinator_address(timeout_secs=ARRIVAL, override_coordinator_port=None)
        host, _, port = address.rpartition(":")
        local = cluster.get_local_process_id()  # under SLURM a process has one GPU, that of its number
        devices = None if local is None else [local]
        return _Job(host, int(port), cluster.get_process_count(), cluster.get_process_id(), devices)
    return None


# ------------------------------------------------------------------------------------------------------------
# Meeting: a process that waits for others inside JAX is aborted without a word about which are missing


def _meet(job: _Job) -> None:
    """Wait until all processes have said their number to the first one, at the port that JAX then uses.

    Raises:
        InputError: some do not come, two have one number, or they do not agree how many they are.
    """
    if job.process == 0:
        _receive(job)
    else:
        _report(job)


def _receive(job: _Job) -> None:
    arrived: set[int] = set()
    connections: list[socket.socket] = []
    end = time.monotonic() + ARRIVAL
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", job.port), family=family, dualstack_ipv6=both, backlog=4096)
    except OSError as error:
        raise InputError(
            f"Port {job.port} of this machine cannot be used ({os.strerror(error.errno)}); give another "
            "one in --coordinator."
        ) from None
    with contextlib.ExitStack() as opened:
        sentence = ""
        with server:
            while len(arrived) < job.processes - 1 and not sentence:
                server.settimeout(max(end - time.monotonic(), 0.01))
                try:
                    connection = opened.enter_context(server.accept()[0])
                    connection.settimeout(5)
                    process, processes = map(int, connection.makefile().readline(100).split())
                except TimeoutError:
                    if time.monotonic() < end:
                        continue  # a connection that says nothing
                    missing = [str(i) for i in range(1, job.processes) if i not in arrived]
                    more = " and others" if len(missing) > 20 else ""
                    sentence = (
                        f"Of {job.processes} processes {', '.join(missing[:20])}{more} did not come within "
                        f"{ARRIVAL} s; start the same command on every machine."
                    )
                except (OSError, ValueError):  # something else that knocks at this port
                    continue
                else:
                    if processes != job.processes:
                        sentence = (
                            f"Process {process} was started as one of {processes} but process 0 as one of "
                            f"{job.processes}; give every one the same --processes."
                        )
                    elif process in arrived or process == 0:
                        sentence = f"Two processes are number {process}; give every one its own --process."
                    arrived.add(process)
                    connections.append(connection)
        # Now that the port is free: all may begin, or end with the sentence.
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(_ANSWER + f"{sentence}\n".encode())
        if sentence:
            raise InputError(sentence)


def _report(job: _Job) -> None:
    end = time.monotonic() + ARRIVAL
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise InputError(
                f"Process 0 did not answer at {job.host}:{job.port} within {ARRIVAL} s; start it, or correct "
                "--coordinator."
            )
        try:
            with socket.create_connection((job.host, job.port), timeout=left) as connection:
                connection.sendall(f"{job.process} {job.processes}\n".encode())
                connection.settimeout(ARRIVAL + 5)  # it may have come last, and waits as long for others
                answer = connection.makefile("rb").readline(1000)
        except OSError:
            answer = b""
        if answer.startswith(_ANSWER):  # otherwise it is not there yet, or something else is
            break
        time.sleep(0.2)
    sentence = answer.removeprefix(_ANSWER).decode().strip()
    if sentence:
        raise InputError(sentence)


# ------------------------------------------------------------------------------------------------------------
# Together


def is_first() -> bool:
    """Whether this is the process that writes logs, pictures and progress."""
    return _joined is None or _joined.job.process == 0


def process() -> int:
    """The number of this process in its job."""
    return 0 if _joined is None else _joined.job.process


def is_alone() -> bool:
    """Whether there is no other process, or what this one does is its own affair (`apart`)."""
    return _joined is None


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this process acts as if it were alone: others need not do the same."""
    global _joined
    joined, _joined = _joined, None
    try:
        yield
    finally:
        _joined = joined


def share(things: Sequence) -> Sequence:
    """Those of the things that are this process's to do, when all processes do them together."""
    return things if _joined is None else things[_joined.job.process :: _joined.job.processes]


def gather(value: Any) -> list:
    """The values of all processes in their order, on every process."""
    if _joined is None:
        return [value]
    job, client, _ = _joined
    place = f"unibiomed/{next(_rounds)}"
    client.key_value_set(f"{place}/{job.process}", json.dumps(value))
    return [json.loads(_read(client, f"{place}/{process}")) for process in range(job.processes)]


def wait_for_all() -> None:
    """Return when every process has come here."""
    gather(None)


def first_says(function: Callable[[], Any]) -> Any:
    """What the function gives on the first process, which alone calls it."""
    return gather(function() if is_first() else None)[0]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What a user can put right and ends the block on one process raises an error on all of them.

    Raises:
        InputError: the block ended well here, and not on another process.
    """
    failure = None
    try:
        yield
    except (BucketError, InputError) as error:
        failure = error
    sentences = gather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for process, sentence in enumerate(sentences):
        if sentence is not None:
            raise InputError(f"On process {process}: {sentence}")


def require_equal(what: str, values: Mapping[str, Any]) -> None:
    """Refuse processes that differ.

    Args:
        what: is compared, in a few words.
        values: by name.

    Raises:
        InputError: names a process, the first value in which it differs from process 0, and both values.
    """
    values = {name: str(value) for name, value in values.items()}
    first, *others = gather(values)
    for process, here in enumerate(others, 1):
        for name in [*first, *here]:
            then, now = first.get(name, "missing"), here.get(name, "missing")
            if then != now:
                raise InputError(
                    f"Process {process} has another {what} than process 0: {name} is {now} there and {then} "
                    "here; start the same command with the same files on every machine."
                )


def code_version() -> dict[str, str]:
    """What computes: hash of this package's files, and JAX's version."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return {"unibiomed_jax": digest.hexdigest()[:12], "jax": version("jax")}


def spread(array: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    """Lay out an array that every process has whole, or that spans processes already.

    JAX would first compare what the processes have whole, for which it gathers all of it from each.
    """
    import jax

    if place.is_fully_addressable or not array.is_fully_addressable:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(array.shape, place, np.asarray(array).__getitem__)


def local_rows(array: jax.Array) -> tuple[list[int], np.ndarray]:
    """(numbers of the rows, rows) of an array divided along its first axis alone that lie on this process."""
    found = {}
    for shard in array.addressable_shards:
        found[shard.index[0].start or 0] = shard.data
    blocks = {start: np.asarray(found[start]) for start in sorted(found)}
    rows = [start + row for start, block in blocks.items() for row in range(len(block))]
    return rows, np.concatenate(list(blocks.values()))


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array that may span processes, on this one; every process asks for it.

    Some rows at a time where it is large: every device holds for a moment what is gathered.
    """
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    if array.nbytes <= _GATHERED or array.ndim == 0 or array.shape[0] == 1:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    rows = max(1, _GATHERED * len(array) // array.nbytes)
    return np.concatenate([whole(array[start : start + rows]) for start in range(0, len(array), rows)])


# ------------------------------------------------------------------------------------------------------------
# Ending


def finish() -> None:
    """Wait for the other processes: the first one may still be writing; none counts as missed after this."""
    wait_for_all()
    if _joined is None:
        return
    if is_first():
        _joined.client.key_value_set(_ENDING, "null")
    _joined.listener.join()


@contextlib.contextmanager
def ending(reason: str, code: int) -> Iterator[None]:
    """Say inside the block why this process fails; then it ends, and so do all others, told the reason.

    Without it the others would wait for this process, and this one, in JAX's farewell, for them. A process
    that is alone goes on after the block.

    Args:
        reason: a sentence.
        code: exit code of every process.
    """
    if _joined is None:
        yield
        return
    from jax.errors import JaxRuntimeError

    job, client, _ = _joined
    _last_words.acquire()
    with contextlib.suppress(JaxRuntimeError):  # another one was faster, or the first one is gone
        client.key_value_set(_ENDING, json.dumps([f"Process {job.process} ended: {reason}", code]))
    try:
        yield
    except Exception:
        traceback.print_exc()
    finally:
        leave(code)


def _listen(job: _Job, client) -> None:
    """In a thread: end when another process says that it fails; until all say that they are done."""
    from jax.errors import JaxRuntimeError

    try:
        told = json.loads(_read(client, _ENDING))
    except JaxRuntimeError:  # the first process is gone, and JAX ends this one
        return
    if told is None:
        return
    sentence, code = told
    _last_words.acquire()
    print(sentence, file=sys.stderr)
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process without waiting for any thread; what was said is flushed."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody may be listening any more
            stream.flush()
    if is_first() and not is_alone():
        time.sleep(_FAREWELL)
    os._exit(code)


def _read(client, key: str) -> str:
    """The value of a key, as soon as some process sets it."""
    from jax.errors import JaxRuntimeError

    while True:
        try:
            return client.blocking_key_value_get(key, _PATIENCE)
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
