"""How a benchmark talks to its worker processes: a JSON line in, a JSON line out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


def serve(prepare: Callable[[dict], tuple[dict, Callable[[dict], dict]]]) -> None:
    """Answer every line of standard input until it ends.

    The first line goes to `prepare`, which returns its reply and the function that answers the other lines.
    Whatever libraries print goes to standard error, so that replies stay apart.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answer = None
    for line in sys.stdin:
        if answer is None:
            reply, answer = prepare(json.loads(line))
        else:
            reply = answer(json.loads(line))
        replies.write(json.dumps(reply) + "\n")


class Worker:
    """A process that answers one JSON line with another; `environment` is added to this process's own."""

    def __init__(self, python: str, script: str, setup: dict, environment: dict[str, str] | None = None):
        self.script = script
        # On a GPU both processes live on one card: JAX must not claim it whole.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4", **os.environ, **(environment or {})}
        self.process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.facts = self.ask(setup)

    def ask(self, message: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            sys.exit(f"{self.script} stopped: see its message above (torch needs the `parity` extra).")
        return json.loads(reply)

    def close(self) -> None:
        """End the process, and with it its memory."""
        self.process.stdin.close()
        self.process.wait()


class Stopwatch:
    """Seconds by stage; `wait` ends when a device has done all it was given."""

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.seconds: dict[str, float] = defaultdict(float)
        self.wait = wait

    @contextmanager
    def stage(self, name: str):
        begin = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] += time.perf_counter() - begin
