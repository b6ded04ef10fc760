"""Dice and right answers of a checkpoint on one split of a dataset, target by target.

    python scripts/measure_accuracy.py --checkpoint runs/unibiomed_tiny/5_volumes/model --markdown accuracy.md

What is asked and how it is judged: `unibiomed_jax/evaluation/accuracy.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unibiomed_jax import UniBiomed
from unibiomed_jax.commands.run import main as run
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.accuracy import ANSWERED, ask, markdown, read_records, tables


@dataclass(frozen=True)
class Args:
    """Measure a checkpoint."""

    # Converted checkpoint.
    checkpoint: Path
    # Dataset folder.
    dataset: Path = Path(__file__).parent.parent / "sample_data"
    # Which part of it; nothing of it may have been trained on.
    split: str = "test"
    # Only the datasets of these names; by default all.
    datasets: tuple[str, ...] = ()
    # Questions asked at a time.
    batch: int = 8
    # Write the tables there, too.
    markdown: Path | None = None
    # Write every single result there.
    json: Path | None = None


def prepare_file(path: Path) -> None:
    """Make sure that a result can be written there, before hours go into it.

    Raises:
        InputError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another file.") from None


def main(args: Args) -> None:
    if args.batch < 1:
        raise InputError(f"--batch {args.batch} must be at least 1.")
    records = read_records(args.dataset, args.split, args.datasets)
    model = UniBiomed.from_pretrained(args.checkpoint)
    for path in filter(None, (args.markdown, args.json)):
        prepare_file(path)
    results = list(ask(model, records, args.batch))
    rows = tables(results)
    console = Console(highlight=False)
    for kind, lines in rows.items():
        table = Table(kind, "right" if kind in ANSWERED else "Dice", "cases", "patients")
        for name, score, cases, patients in lines:
            table.add_row(name, f"{score:.2f}", str(cases), str(patients or ""))
        console.print(table)
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    if args.json:
        entries = [
            {"name": r.record.name, "kind": str(r.record.kind), "score": r.score, "text": r.text}
            for r in results
        ]
        args.json.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    run(Args, main)
