"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def stop_at_once() -> None:
    """While there is nothing to save yet, SIGTERM ends the process with exit code 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


class Stop:
    """Whether the run should stop: asked for by a signal to any process, and agreed by all at one update."""

    def __init__(self):
        """Take the first SIGTERM or SIGINT as the wish to stop; a second SIGINT interrupts at once."""
        self._asked = threading.Event()
        self._agreed = False
        # Whether any process had been asked when all came here the last time.
        self._before: jax.Array | None = None

        def request(number, _frame):
            self._asked.set()
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGTERM, request)
        signal.signal(signal.SIGINT, request)
        mesh = Mesh(np.asarray(jax.devices()), ("all",))
        self._places = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def agreed(self) -> bool:
        """Whether all processes stop here; all call it in the same places.

        Processes that stopped at different updates would wait for each other for ever. The devices tell each
        other, and the answer is looked at when the next one is asked for: it lies before the program that
        runs meanwhile, so that nobody waits.
        """
        if jax.process_count() == 1:
            return self._asked.is_set()
        before = self._before
        asked = np.full(jax.local_device_count(), self._asked.is_set())
        self._before = self._any(jax.make_array_from_process_local_data(self._places, asked))
        self._agreed = self._agreed or (before is not None and bool(before))
        return self._agreed
