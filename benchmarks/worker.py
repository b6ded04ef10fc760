"""How a worker process talks to `versus_torch.py`: a JSON line in, a JSON line out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager


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
