"""Seconds an image that `unibiomed eval` takes to answer, beside asking one record after the other.

    python benchmarks/evaluating.py                   # 24 images of the sample data with all their records
    python benchmarks/evaluating.py --images 8

Three ways to the same answers: a process of `unibiomed predict` for every record (timed on one),
`UniBiomed.predict` record by record in a process that has compiled everything, and the batches of
`unibiomed eval`, warm too. An image counts with all its records: its targets and questions. The stages of the
last way go on beside each other; the longest of them bounds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from unibiomed_jax import UniBiomed
from unibiomed_jax.evaluation.answering import Asker
from unibiomed_jax.evaluation.own_format import read_own_format
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.inference.answer import Request

ROOT = Path(__file__).parents[1]
TASKS = ("seg2d", "disease", "gvqa", "report")


@dataclass(frozen=True)
class Options:
    """Time answering."""

    # So many images, spread over the test split, with all their records.
    images: int = 24
    # Converted checkpoint.
    checkpoint: Path = ROOT / "checkpoints" / "unibiomed-tiny"
    # Dataset folder.
    data: Path = ROOT / "sample_data"
    # Longest answer, tokens.
    max_new_tokens: int = 96
    # Records asked about in one go.
    batch_size: int = 8


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of processors, of the second call: the first one compiles."""
    function()
    started = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def run_predict(sample: Sample, options: Options) -> float:
    """Seconds of one process of `unibiomed predict`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "unibiomed_jax.cli", "predict", str(options.data / sample.image)]
        command += ["--prompt", sample.question, "--checkpoint", str(options.checkpoint), "--out", out]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started


def main(options: Options) -> None:
    everything = read_own_format(options.data, "test", TASKS)
    images = list(dict.fromkeys(sample.image for sample in everything))
    chosen = set(images[:: max(1, len(images) // options.images)][: options.images])
    samples = [sample for sample in everything if sample.image in chosen]
    model = UniBiomed.from_pretrained(options.checkpoint)
    stages: Counter[str] = Counter()
    predict_batch = model.predict_batch

    def watched(*arguments, **named):
        answers = predict_batch(*arguments, **named)
        stages.update(answers[0].seconds)
        return answers

    def one_by_one() -> None:
        for sample in samples:
            request = Request(sample.question, options.data / sample.image)
            predict_batch([request], max_new_tokens=options.max_new_tokens)

    def together() -> None:
        stages.clear()
        asker = Asker(
            model, options.data, batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
        )
        failed = [sample.reason for sample in asker.ask(samples) if sample.reason is not None]
        assert not failed, failed

    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{len(chosen)} images, {len(samples)} records")
    alone = run_predict(samples[0], options) * len(samples)
    seconds, cpu = timed(one_by_one)
    model.predict_batch = watched
    ours, ours_cpu = timed(together)
    print("| way | seconds an image | CPU seconds an image | eval is so many times as fast | in CPU time |")
    print("|---|---|---|---|---|")
    for way, wall, work in (
        ("`unibiomed predict`, a process a record", alone, None),
        ("`UniBiomed.predict`, record by record", seconds, cpu),
        ("`unibiomed eval`", ours, ours_cpu),
    ):
        print(
            f"| {way} | {wall / len(chosen):.3f} | {'' if work is None else f'{work / len(chosen):.3f}'} "
            f"| {wall / ours:.1f} | {'' if work is None else f'{work / ours_cpu:.1f}'} |"
        )
    bound = ", ".join(f"{name} {100 * value / ours:.0f} %" for name, value in stages.most_common())
    print(f"Of the time of eval, some at the same time: {bound}.")


if __name__ == "__main__":
    main(tyro.cli(Options))
