"""Seconds, memory and arithmetic of one training update, beside the same update through torch.

    python benchmarks/train.py [--size full|tiny|micro] [--torch-python PYTHON] [--jax-python PYTHON]

"full" is UniBiomed-1B with the recipe of the reference: adapters of rank 128 on the decoder, embeddings,
output head, projector, bridge and mask decoder train, the image encoders are frozen; one image of one tile,
300 tokens, one object. "tiny" is configs/unibiomed_tiny/1_base.py, of which all trains; eight images of 80
tokens, one object each; of SAM2's memory, which single images do not reach, only this library has
parameters to decay. Weights are random and differ between the two libraries, the batch and all other shapes
are the same.

Each library lives in a worker process with its own interpreter (torch needs the `parity` extra). They update
in turn; only at full size on a CPU, where few machines hold both, one after the other: first all updates of
this library, then, when its process has ended, all of torch.

This library starts twice, first with an empty compilation cache, then from what that start has stored; the
second process is the one that is measured. Seconds include moving the batch to the device. Operations are
those of the batch (unibiomed_jax/training/flops.py), for both libraries alike: what is computed again in the
backward pass does not count. They are compared with the rate of a large matrix product, which the first of
these processes measures: in float32 for a library that computes in it alone, else in the faster of float32
and bfloat16.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table
from worker import Worker

JAX, TORCH = "this library", "torch"


@dataclass(frozen=True)
class Args:
    # "micro" is only to see that this works.
    size: Literal["full", "tiny", "micro"] = "full"
    # Of this library; "auto" is float32 on a CPU and bfloat16 on a GPU, as torch.
    precision: PrecisionName = "auto"
    # Samples of a batch; by default 1 at full size and 8 of the tiny model.
    samples: int | None = None
    # Updates of each, after a first one that does not count.
    repeats: int = 5
    # Without torch, this library is measured alone.
    torch: bool = True
    # Interpreters of the two workers.
    jax_python: str = sys.executable
    torch_python: str = sys.executable
    # Write all numbers there, too.
    json: Path | None = None


@dataclass(frozen=True)
class Started:
    """A worker that has made its first update."""

    worker: Worker
    # From the start of the process, and of the update alone.
    seconds: dict[str, float]


def start(python: str, script: str, setup: dict, environment: dict[str, str] | None = None) -> Started:
    begin = time.perf_counter()
    worker = Worker(python, script, setup, environment)
    update = worker.ask({})["seconds"]
    return Started(worker, {"from the start of the process": time.perf_counter() - begin, "update": update})


def updates(workers: dict[str, Worker], repeats: int) -> dict[str, list[dict]]:
    """What every update said, by library; they take turns."""
    said = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            said[name].append(worker.ask({}))
            if not math.isfinite(said[name][-1]["loss"]):
                sys.exit(f"The loss of {name} is not finite, so its updates mean nothing.")
    return said


def require_same_size(ours: dict, theirs: dict) -> None:
    """Stop if the two libraries, by what their workers said, do not train equally many numbers."""
    shared = ours["trainable"] - ours["trainable_memory"]
    if shared != theirs["trainable"]:
        sys.exit(
            f"Beside SAM2's memory {shared:,} parameters train in {JAX} but {theirs['trainable']:,} in "
            f"{TORCH}; their times cannot be compared: correct RECIPE or FROZEN in benchmarks/train_torch.py."
        )


def rates(facts: dict, said: list[dict], matmul: dict[str, float], formats: str) -> dict[str, float]:
    """The rows of the table for one library, which computes in `formats`; `facts` are the JAX worker's.

    `matmul` is the measured rate of a large product by number format, operations a second.
    """
    seconds = statistics.median(update["seconds"] for update in said)
    ceiling = max(matmul.values()) if "bfloat16" in formats else matmul["float32"]
    rows = {
        "seconds an update": seconds,
        "images a second": facts["samples"] / seconds,
        "tokens a second": facts["tokens"] / seconds,
        "TFLOP/s": facts["flops"] / seconds / 1e12,
        "share of the measured matmul rate": facts["flops"] / seconds / ceiling,
        "peak memory, GiB": said[-1]["peak_bytes"] / 2**30,
    }
    if facts["peak_flops"] is not None:
        rows["share of the device's peak"] = facts["flops"] / seconds / facts["peak_flops"]
    return rows


def table_of(rows: dict[str, dict[str, float]]) -> Table:
    table = Table(title="One update: median")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for row in rows[JAX]:
        table.add_row(row, *(f"{values[row]:.4g}" for values in rows.values()))
    return table


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    console = Console(width=110, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        batch = str(Path(folder) / "batch.npz")
        setup = {"size": args.size, "precision": args.precision, "samples": args.samples, "batch": batch}
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        }
        empty = start(args.jax_python, "train_jax.py", setup, cache)
        matmul = empty.worker.ask({"measure": "matmul"})
        empty.worker.close()
        ours = start(args.jax_python, "train_jax.py", setup, cache)
        facts = ours.worker.facts
        console.print(
            f"{facts['name']}: {facts['precision']}\n{facts['trainable']:,} parameters train, "
            f"{facts['samples']} images, {facts['tokens']} tokens, {facts['flops'] / 1e12:.3f} TFLOP\n"
            "a large matrix product: "
            + ", ".join(f"{dtype} {rate / 1e12:.3f} TFLOP/s" for dtype, rate in matmul.items())
        )
        formats = {JAX: facts["precision"]}
        firsts = {"compilation cache empty": empty.seconds, "from the compilation cache": ours.seconds}

        def start_torch() -> Worker:
            theirs = start(args.torch_python, "train_torch.py", {**facts, "batch": batch})
            firsts[TORCH] = theirs.seconds
            said = theirs.worker.facts
            require_same_size(facts, said)
            formats[TORCH] = said["precision"]
            console.print(f"{said['name']}: {said['precision']}\n{said['trainable']:,} parameters train")
            return theirs.worker

        workers, said = {JAX: ours.worker}, {}
        if args.torch and args.size == "full" and facts["backend"] == "cpu":
            said = updates(workers, args.repeats)
            ours.worker.close()
            workers = {}
        if args.torch:
            workers[TORCH] = start_torch()
        said |= updates(workers, args.repeats)
        for worker in workers.values():
            worker.close()

    for name, seconds in firsts.items():
        console.print(
            f"First update, {name}: {seconds['update']:.1f} s; "
            f"{seconds['from the start of the process']:.1f} s from the start of the process"
        )
    rows = {name: rates(facts, updated, matmul, formats[name]) for name, updated in said.items()}
    console.print(table_of(rows))
    report = {"jax": facts, "matmul": matmul, "first": firsts, "median": rows, "updates": said}
    if args.torch:
        report["ratio"] = rows[TORCH]["seconds an update"] / rows[JAX]["seconds an update"]
        console.print(
            f"torch ({formats[TORCH]}) takes {report['ratio']:.2f} times as long as this library "
            f"({formats[JAX]})",
            style="bold",
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
