"""The second act of `unibiomed eval`: the answers of a run, or predictions in folders, are scored."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from unibiomed_jax.commands.eval.answer import CONFIG
from unibiomed_jax.commands.eval.options import EvalOptions
from unibiomed_jax.commands.eval.printing import NAMED, console, number
from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.files import read_json, shown

# What a reader of the numbers of volumes has to know.
CONDITIONING = {
    "first": "Volumes were answered from their first slices, as by UniBiomed's scripts.",
    "target": "Volumes were answered from slices that show the true target, which is knowledge of the truth; "
    "UniBiomed's scripts take the first ones.",
}


def score(options: EvalOptions) -> int:
    """Score and write results; FAILED_IN_PART if something could not be scored."""
    from unibiomed_jax.evaluation import page, paper, records, reference_samples, scoring
    from unibiomed_jax.evaluation.repairs import Repairs

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
        found, samples = scoring.score_strict(
            samples, scoring.read_tolerances(options.tolerances), options.rule
        )
        results += found.values()
        for task, of_task in samples.items():
            records.write_samples(records.samples_file(options.out, task), of_task)
    if samples:
        data = scoring.hash_data(samples)
    else:
        meta = "meta_" if options.task == ("seg3d",) else ""
        data = scoring.hash_table(options.data / f"{meta}{options.split}.json")
    options.out.mkdir(parents=True, exist_ok=True)
    about = _about(options)
    for result in results:
        if result.task == "seg3d" and "conditioning" in about:
            result.notes.append(CONDITIONING[about["conditioning"]])
    scoring.write_results(options.out, results, checkpoint=about.get("checkpoint"), data=data)
    page.write_page(options.out / page.PAGE, results, samples, about | {"data": data})
    for result in results:
        _show(result, scoring.rows([result]))
    console.print(f"Written: {escape(shown(options.out / scoring.RESULTS))}", soft_wrap=True)
    return FAILED_IN_PART if any(result.unscored for result in results) else DONE


def _folders(options: EvalOptions) -> tuple[Path, Path, str]:
    return options.data, options.predictions, options.split


def _about(options: EvalOptions) -> dict:
    """What is known about who answered: the run's config.json, if it has one."""
    from unibiomed_jax.evaluation import scoring

    path = options.out / CONFIG
    known: dict = {"versions": scoring.versions()}
    if options.data is not None:
        known |= {"folder": str(options.data), "split": options.split}
    return read_json(path) if path.exists() else known


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
                number(row["value"]),
                "" if row.get("low") is None else f"{number(row['low'])} to {number(row['high'])}",
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
