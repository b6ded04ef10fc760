"""This library against the same computation through torch modules, call by call in turn.

    python benchmarks/versus_torch.py [--torch-python PYTHON] [--jax-python PYTHON] [--json FILE]

Both answer a question about one image of one tile (281 tokens) in 24 tokens, with one `[SEG]` and with
five, at full size. Weights are random and differ between the two, the shapes of all arrays are the same.
Each library lives in a worker process with its own interpreter (torch needs the `parity` extra); only one
computes at a time. Seconds of this library include cutting the image, the tokenizer and reading the
answer; torch is given arrays and token ids. On a CPU that multiplies bfloat16 torch is measured under
bfloat16 autocast as well.

The processor of an older machine, of which XLA, oneDNN and ATen use no more than they find there:

    XLA_FLAGS=--xla_cpu_max_isa=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python ...
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

from unibiomed_jax.config.precision import PrecisionName, bfloat16_units

NEW_TOKENS = 24
JAX = "this library"


@dataclass(frozen=True)
class Args:
    # "full": UniBiomed-1B; "micro": only to see that this works.
    size: Literal["full", "micro"] = "full"
    # Of this library; "auto" is what it chooses on this backend.
    precision: PrecisionName = "auto"
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
    ours, *others = medians
    table.add_column(ours, justify="right")
    for name in others:
        table.add_column(name, justify="right")
        table.add_column("ratio", justify="right")
    for stage, seconds in medians[ours].items():
        cells = [f"{seconds:.3f}"]
        for name in others:
            theirs = medians[name].get(stage)
            cells += ["", ""] if theirs is None else [f"{theirs:.3f}", f"{theirs / seconds:.2f}"]
        table.add_row(stage, *cells, style="bold" if stage == "whole call" else None)
    return table


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    console = Console(width=130, highlight=False)
    setup = dict(size=args.size, precision=args.precision, new_tokens=NEW_TOKENS, segments=args.segments)
    ours = Worker(args.jax_python, "worker_jax.py", setup)
    theirs = Worker(args.torch_python, "worker_torch.py", {**ours.facts, "new_tokens": NEW_TOKENS})
    console.print(f"{ours.facts['name']}: {ours.facts['precision']}")
    console.print(theirs.facts["name"])
    console.print(f"{ours.facts['tiles']} tiles, a prompt of {ours.facts['prompt_tokens']} tokens")

    # Torch's ways, by the title of their column.
    if "cuda" in theirs.facts["device"]:
        ways = {"torch bfloat16, encodes once": ("once", "bfloat16")}
        ways["torch bfloat16, the reference's way"] = ("reference", "bfloat16")
    else:
        ways = {"torch float32, encodes once": ("once", "float32")}
        if bfloat16_units():
            ways["torch bfloat16 autocast, encodes once"] = ("once", "bfloat16")
        ways["torch float32, the reference's way"] = ("reference", "float32")
    report = {"jax": ours.facts["name"], "torch": theirs.facts["name"], "precision": ours.facts["precision"]}
    for segments in args.segments:
        in_turn = {JAX: lambda n=segments: ours.ask({"segments": n})}
        for title, (way, precision) in ways.items():
            case = {"segments": segments, "way": way, "precision": precision}
            in_turn[title] = lambda case=case: theirs.ask(case)
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
