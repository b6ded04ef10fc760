"""`unibiomed eval`: score answers, and compare two runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.config.fields import Address
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import read_json, shown

console = Console()
# Names of what was not scored that are printed; all are in results.json.
NAMED = 5

TaskName = Literal["seg2d", "seg3d", "disease", "region", "gvqa", "report", "caption", "vqa"]


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Score the answers of a run, or predictions in the folders of UniBiomed's scripts."""

    # Folder of the run: its samples_TASK.jsonl are scored, and results.json and results.csv written there.
    out: Address
    # What to do: "score" the answers that are there.
    mode: Literal["score"] = "score"
    # Tasks; by default all that the run has.
    task: tuple[TaskName, ...] = ()
    # "paper": the numbers that UniBiomed's scripts compute; "strict": definitions of the field, in
    # millimetres, with intervals.
    protocol: Literal["paper", "strict", "both"] = "strict"
    # Folder of predictions as UniBiomed's scripts write them, of a single --task; its records go to --out.
    predictions: Path | None = None
    # Folder of the dataset that they are about.
    data: Path | None = None
    # Part of it.
    split: str = "test"
    # Under "paper": do sensibly, and note, what the reference fails at.
    repair: bool = False
    # Write the run's predictions there too, in the folders of UniBiomed's scripts.
    folders: Address | None = None
    # Under "strict": a JSON file of tolerances of the surface Dice by target, mm.
    tolerances: Path | None = None


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """By how much a second run is better than a first, with intervals over the patients of both."""

    first: Annotated[Address, tyro.conf.Positional]
    second: Annotated[Address, tyro.conf.Positional]
    # Write the table there, as CSV.
    csv: Address | None = None
    # Every target, not the means over them alone.
    targets: bool = False


def evaluate(options: EvalOptions) -> int:
    """Run `unibiomed eval`; FAILED_IN_PART if something could not be scored."""
    from unibiomed_jax.evaluation import paper, records, reference_samples, scoring
    from unibiomed_jax.evaluation.repairs import Repairs

    _check(options)
    repairs, results = Repairs(options.repair), []
    samples = scoring.read_run(options.out, options.task) if options.predictions is None else {}
    if options.folders is not None:
        for task, of_task in samples.items():
            paper.to_folders(task, of_task, options.folders, options.split)
    if options.protocol != "strict":
        if options.predictions is None:
            skipped = paper.WITHOUT_SCRIPTS if options.protocol == "both" else ()
            inputs = {
                task: paper.from_samples(task, samples[task]) for task in samples if task not in skipped
            }
        else:
            (task,) = options.task
            inputs = {task: paper.from_folders(task, *_folders(options), repairs)}
        results += scoring.score_paper(inputs, repairs).values()
    if options.protocol != "paper":
        if options.predictions is not None:
            (task,) = options.task
            samples = {task: reference_samples.read_samples(task, *_folders(options))}
        found, samples = scoring.score_strict(samples, scoring.read_tolerances(options.tolerances))
        results += found.values()
        for task, of_task in samples.items():
            records.write_samples(records.samples_file(options.out, task), of_task)
    if samples:
        data = scoring.hash_data(samples)
    else:
        meta = "meta_" if options.task == ("seg3d",) else ""
        data = scoring.hash_table(options.data / f"{meta}{options.split}.json")
    options.out.mkdir(parents=True, exist_ok=True)
    scoring.write_results(options.out, results, checkpoint=_checkpoint(options.out), data=data)
    for result in results:
        _show(result, scoring.rows([result]))
    console.print(f"Written: {escape(shown(options.out / scoring.RESULTS))}", soft_wrap=True)
    return FAILED_IN_PART if any(result.unscored for result in results) else DONE


def _folders(options: EvalOptions) -> tuple[Path, Path, str]:
    return options.data, options.predictions, options.split


def _check(options: EvalOptions) -> None:
    if options.predictions is None:
        if options.data is not None:
            raise InputError("--data belongs to --predictions; leave it out, or name the predictions too.")
        return
    if options.folders is not None:
        raise InputError("--folders writes the predictions of a run; leave out --predictions.")
    if len(options.task) != 1:
        raise InputError("--predictions holds those of one task; name it with --task.")
    if options.data is None:
        raise InputError(
            "--predictions are compared with the truth of a dataset; name its folder with --data."
        )


def _checkpoint(run: Path) -> str | None:
    """Hash of what answered, from the run's config.json, if it has one."""
    path = run / "config.json"
    return read_json(path).get("checkpoint") if path.exists() else None


def _show(result, rows: list[dict]) -> None:
    """One task under one protocol: the means over targets, notes, and what was not scored."""
    table = Table(title=f"{result.task}, {result.protocol} protocol", title_justify="left")
    for column in ("dataset", "score", "mean", "95 %", "n", "patients"):
        table.add_column(column, justify="left" if column in ("dataset", "score") else "right")
    datasets = {row.get("dataset") for row in rows} - {None}
    for row in rows:  # of a single dataset, its means are those of the whole
        if row.get("target") is None and (row.get("dataset") is None or len(datasets) > 1):
            table.add_row(
                escape(shown(row.get("dataset") or "all")),
                row["score"],
                _number(row["value"]),
                "" if row.get("low") is None else f"{_number(row['low'])} to {_number(row['high'])}",
                str(row["n"]),
                str(row.get("patients", "")),
            )
    console.print(table)
    for note in result.notes:
        console.print(escape(note), soft_wrap=True, highlight=False)
    for name, reason in list(result.unscored.items())[:NAMED]:
        console.print(escape(f"Not scored: {shown(name)} ({reason})"), soft_wrap=True, highlight=False)
    if len(result.unscored) > NAMED:
        console.print(f"... and {len(result.unscored) - NAMED} more, in results.json.")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def compare(options: CompareOptions) -> int:
    """Run `unibiomed eval compare`."""
    from unibiomed_jax.evaluation import scoring
    from unibiomed_jax.evaluation.compare import compare as compare_runs
    from unibiomed_jax.evaluation.compare import write_csv

    runs = [scoring.read_run(run, ()) for run in (options.first, options.second)]
    differences, alone = compare_runs(*runs, (options.first, options.second))
    table = Table(title="second minus first, the same patients drawn for both", title_justify="left")
    for column in (
        "task",
        "dataset",
        "target",
        "score",
        "first",
        "second",
        "difference",
        "95 % interval",
        "n",
    ):
        table.add_column(
            column, justify="left" if column in ("task", "dataset", "target", "score") else "right"
        )
    datasets = {(found.task, found.difference.dataset) for found in differences}
    for found in differences:
        if found.difference.target is not None and not options.targets:
            continue
        if found.difference.target is None and found.difference.dataset is not None:
            if sum(task == found.task for task, _ in datasets) == 2:  # the whole, and this one
                continue
        low, high = found.difference.interval or (None, None)
        table.add_row(
            found.task,
            escape(shown(found.difference.dataset or "all")),
            escape(shown(found.difference.target or "all")),
            found.difference.score,
            _number(found.first.value),
            _number(found.second.value),
            f"{found.difference.value:+.4f}{' *' if found.certain else ''}",
            "-" if low is None else f"{low:+.4f} to {high:+.4f}",
            str(found.difference.cases),
        )
    console.print(table)
    console.print("* the interval leaves out 0; - fewer than 5 patients")
    for task, number in alone.items():
        if number:
            console.print(f"{task}: {number} records were scored in one run only, and are left out.")
    if options.csv is not None:
        write_csv(options.csv, differences)
    return DONE
