"""`unibiomed data`: make, check and pack datasets to train on."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.datasets.build import BuildOptions
from unibiomed_jax.datasets.build import build as build_dataset
from unibiomed_jax.datasets.pack import PackOptions
from unibiomed_jax.datasets.pack import pack as pack_dataset
from unibiomed_jax.datasets.validate import ValidateOptions
from unibiomed_jax.datasets.validate import validate as validate_datasets
from unibiomed_jax.files import shown

console = Console()


def _say(sentence: str) -> None:
    """One line, with the names in it as they are (see `shown`)."""
    console.print(escape(shown(sentence)), highlight=False, soft_wrap=True)


def build(options: BuildOptions) -> int:
    """Run `unibiomed data build`."""
    with console.status(f"Writing {escape(shown(options.out))}"):
        report = build_dataset(options)
    console.print(report.table())
    targets = ", ".join(f"{name} ({count})" for name, count in report.targets.items())
    _say(f"Targets: {targets}")
    for path in report.without_masks:
        _say(f"{path} has no mask and was left out.")
    for path in report.empty_masks:
        _say(f"{path} is empty at the size that is written and was left out.")
    for path in report.not_read:
        _say(f"{path} is nothing that this command reads and was left out.")
    for split, reason in report.empty_splits.items():
        without = "; training goes without validation" if split == "val" else ""
        _say(f"Warning: {split} is empty, because {reason}{without}.")
    _say(f"Next: unibiomed data validate {options.out}")
    return DONE


def validate(options: ValidateOptions) -> int:
    """Run `unibiomed data validate`; FAILED_IN_PART if there are errors. Warnings may be meant."""
    with console.status(f"Checking {escape(shown(options.path))}"):
        report = validate_datasets(options)
    console.print(report.table())
    problems = report.errors + report.warnings
    for problem in problems[: options.show]:
        label = "[red]error[/red]" if problem.error else "[yellow]warning[/yellow]"
        text = escape(shown(problem.text))
        console.print(f"{label} ({problem.sort})", text, highlight=False, soft_wrap=True)
    if len(problems) > options.show:
        console.print(f"... and {len(problems) - options.show} more (--show {len(problems)} prints all).")
    console.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
    return FAILED_IN_PART if report.errors else DONE


def pack(options: PackOptions) -> int:
    """Run `unibiomed data pack`."""
    with console.status(f"Writing {escape(shown(options.out))}"):
        report = pack_dataset(options)
    kept = f", {report.kept} of them written before" if report.kept else ""
    _say(
        f"{report.records:,} records of {report.tables} tables in {report.folders} folders: {report.files:,} "
        f"files, {report.bytes / 1e6:,.1f} MB in {report.shards} shards{kept}"
    )
    if options.tokenizer is None:
        _say("The texts were not measured: the first run does that at its start; --tokenizer does it here.")
    _say(f"Next: set DATASET of the configuration to {options.out}")
    return DONE
