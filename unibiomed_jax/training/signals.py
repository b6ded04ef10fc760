"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import sys
import threading


def stop_at_once() -> None:
    """While there is nothing to save yet, SIGTERM ends the process with exit code 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def stop_on_signals() -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets; a second SIGINT interrupts at once."""
    stop = threading.Event()

    def request(number, _frame):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)
    return stop
