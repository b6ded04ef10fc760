"""This library against the same computation through torch modules, call by call in turn.

    python benchmarks/versus_torch.py [--torch-python PYTHON] [--jax-python PYTHON] [--json FILE]

Both answer a question about one image of one tile (281 tokens) in 24 tokens, with one `[SEG]` and with
five, at full size. Weights are random and differ between the two, the shapes of all arrays are the same.
Each library lives in a worker process with its own interpreter (torch needs the `parity` extra); only one
computes at a time. Seconds of this library include cutting the image, the tokenizer and reading the
answer; torch is given arrays and token ids.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table
from worker import Worker

NEW_TOKENS = 24
JAX, ONCE, REFERENCE = "this library", "torch, encodes once", "torch, the reference's way"


@dataclass(frozen=True)
class Args:
    # "full": UniBiomed-1B; "micro": only to see that this works.
    size: Literal["full", "micro"] = "full"
    # Of this library; "auto" is what it chooses on this backend. Torch: float32 on a CPU, bfloat16 on a GPU.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Calls of each, after a first one that does not count.
    repeats: int = 3
    # Numbers of `[SEG]` in an answer, a table each.
    segments: tuple[int, ...] = (1, 5)
    # Interpreters of the two workers.
    jax_python: str = sys.executable
    torch_python: str = sys.executable
    # Write all numbers there, too.
    json: Path | None = None


def table_of(segments: int, medians: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"{segments} \\[SEG]: median seconds, and how many times longer torch takes")
    table.add_column("stage")
    for name in (JAX, ONCE, "ratio", REFERENCE, "ratio"):
        table.add_column(name, justify="right")
    ours = medians[JAX]
    for stage in ours:
        cells = [f"{ours[stage]:.3f}"]
        for name in (ONCE, REFERENCE):
            theirs = medians[name].get(stage)
            cells += ["", ""] if theirs is None else [f"{theirs:.3f}", f"{theirs / ours[stage]:.2f}"]
        table.add_row(stage, *cells, style="bold" if stage == "whole call" else None)
    return table


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    console = Console(width=110, highlight=False)
    setup = dict(size=args.size, precision=args.precision, new_tokens=NEW_TOKENS, segments=args.segments)
    ours = Worker(args.jax_python, "worker_jax.py", setup)
    theirs = Worker(args.torch_python, "worker_torch.py", {**ours.facts, "new_tokens": NEW_TOKENS})
    for worker in (ours, theirs):
        console.print(f"{worker.facts['name']}: {worker.facts['precision']}")
    console.print(f"{ours.facts['tiles']} tiles, a prompt of {ours.facts['prompt_tokens']} tokens")

    report = {"jax": ours.facts["name"], "torch": theirs.facts["name"], "precision": ours.facts["precision"]}
    for segments in args.segments:
        in_turn = {
            JAX: lambda n=segments: ours.ask({"segments": n}),
            ONCE: lambda n=segments: theirs.ask({"segments": n, "way": "once"}),
            REFERENCE: lambda n=segments: theirs.ask({"segments": n, "way": "reference"}),
        }
        calls = {name: [] for name in in_turn}
        for turn in range(args.repeats + 1):
            for name, call in in_turn.items():
                if turn == 0 and name != JAX and segments != args.segments[0]:
                    continue  # torch compiles nothing: it is warm since the first case
                seconds = call()
                if turn > 0:
                    calls[name].append(seconds)
        medians = {
            name: {stage: statistics.median(call[stage] for call in made) for stage in made[0]}
            for name, made in calls.items()
        }
        console.print(table_of(segments, medians))
        report[f"{segments} [SEG]"] = {"median": medians, "calls": calls}
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
