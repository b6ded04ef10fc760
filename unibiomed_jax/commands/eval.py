"""`unibiomed eval`: ask the records of a dataset, score the answers, and compare two runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from unibiomed_jax import distributed
from unibiomed_jax.commands.model import load_model
from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.config.fields import Address
from unibiomed_jax.config.precision import PrecisionName
from unibiomed_jax.distributed import Processes
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import in_bucket, read_json, shown, write_beside

console = Console()
# Names of what was not scored that are printed; all are in results.json.
NAMED = 5

CONFIG = "config.json"
# Entries of it that must not change while a run goes on.
ANSWERS_DEPEND_ON = (
    "checkpoint",
    "folder",
    "format",
    "split",
    "datasets",
    "conditioning",
    "precision",
    "max_new_tokens",
)

# What a reader of the numbers of volumes has to know.
CONDITIONING = {
    "first": "Volumes were answered from their first slices, as by UniBiomed's scripts.",
    "target": "Volumes were answered from slices that show the true target, which is knowledge of the truth; "
    "UniBiomed's scripts take the first ones.",
}

Format = Literal[
    "unibiomed", "reference", "biomedparse", "mecovqa", "slake", "vqa-rad", "parquet", "omnimedvqa", "table"
]
Rule = Literal["medplib", "llava-med", "medevalkit", "lmms-eval"]
TaskName = Literal["seg2d", "seg3d", "disease", "region", "gvqa", "report", "caption", "vqa", "all"]


@dataclasses.dataclass(frozen=True)
class EvalOptions(Processes):
    """Ask a model the records of a dataset and score its answers; or score those of a run, or predictions in
    the folders of UniBiomed's scripts.
    """

    # Folder of the run: answers go to samples_TASK.jsonl, numbers to results.json and results.csv.
    out: Address
    # A converted or a released folder, or a repository on Hugging Face; without one, what the run has is
    # scored.
    checkpoint: Annotated[str | Path | None, tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")] = None
    # One act alone: "infer" answers, "score" scores the answers that are there.
    mode: Literal["infer", "score"] | None = None
    # Tasks; by default all that the data, or the run, has.
    task: tuple[TaskName, ...] = ()
    # "paper": the numbers that UniBiomed's scripts compute; "strict": definitions of the field, in
    # millimetres, with intervals.
    protocol: Literal["paper", "strict", "both"] = "strict"
    # Folder of predictions as UniBiomed's scripts write them, of a single --task; its records go to --out.
    predictions: Address | None = None
    # Folder of the dataset that is asked, or that predictions are about.
    data: Address | None = None
    # How it is laid out; `unibiomed eval --list` says what is known.
    format: Format = "unibiomed"
    # Part of it.
    split: str = "test"
    # Ask only the datasets of these names.
    datasets: tuple[str, ...] = ()
    # Under "paper": do sensibly, and note, what the reference fails at.
    repair: bool = False
    # Write the run's predictions there too, in the folders of UniBiomed's scripts.
    folders: Address | None = None
    # Under "strict": a JSON file of tolerances of the surface Dice by target, mm.
    tolerances: Path | None = None
    # Under "strict": when an answer to a closed or open question is right, as these publish numbers.
    rule: tuple[Rule, ...] = ("medplib", "lmms-eval")
    # Slices of a volume that are answered from: "first", as by UniBiomed's scripts, or "target", spread over
    # those that show the true target, which needs to know them.
    conditioning: Literal["first", "target"] = "target"
    # Images asked about in one go; takes the memory of the next power of two.
    batch_size: int = 8
    # Longest answer, tokens.
    max_new_tokens: int = 2048
    # "auto": bfloat16, as the reference; float32 on a CPU. "fast": coarser, where a CPU multiplies bfloat16.
    precision: PrecisionName = "auto"
    # Divide the model over all devices of a process: a strategy of unibiomed_jax/sharding/strategies.py.
    strategy: str | None = None
    # With a strategy: devices along the axes of the mesh, such as fsdp=4,tensor=2.
    mesh: str | None = None


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """By how much a second run is better than a first, with intervals over the patients of both."""

    first: Annotated[Address, tyro.conf.Positional]
    second: Annotated[Address, tyro.conf.Positional]
    # Write the table there, as CSV.
    csv: Address | None = None
    # Write a page about it there, such as compare.html.
    page: Address | None = None
    # Every target, not the means over them alone.
    targets: bool = False


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """What can be evaluated, with its licence and where to get it; `unibiomed eval --list` is the same."""


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Ask a model all of UniBiomed's test sets that are there; set its numbers beside the published ones."""

    # The released checkpoint, as for `unibiomed eval`.
    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")]
    # The folder Biomed of the reference's layout.
    data: Path
    # Answers go there, published_numbers.md and published_numbers.csv; a second call goes on with the first.
    out: Path = Path("reproduced")
    # Tasks; by default all that the data has.
    task: tuple[Literal["seg2d", "disease", "region", "gvqa", "report", "caption"], ...] = ()
    # Images asked about in one go.
    batch_size: int = 8
    # As for `unibiomed eval`.
    precision: PrecisionName = "auto"


def evaluate(options: EvalOptions) -> int:
    """Run `unibiomed eval`; FAILED_IN_PART if something could not be answered or scored.

    Every process of a job has the model on devices of its own and answers its share; the first one scores.
    """
    distributed.join(options)
    console.quiet = not distributed.is_first()
    if "all" in options.task:
        options = dataclasses.replace(options, task=())
    _check(options)
    failed = 0
    if options.checkpoint is not None:
        failed = _answer(options)
    if options.mode == "infer" or not distributed.is_first():
        return FAILED_IN_PART if failed else DONE
    return _score(options)


def _score(options: EvalOptions) -> int:
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


def _answer(options: EvalOptions) -> int:
    """Ask what has no answer yet; how many have none in the end."""
    import jax  # which starts only when it is needed

    from unibiomed_jax.evaluation import answering, readers, scoring
    from unibiomed_jax.inference.answer import INTENDED_USE

    samples = readers.read_records(
        options.data, options.split, options.task, options.datasets, options.format
    )
    asked = dataclasses.asdict(options)
    del asked["process"]
    data = scoring.hash_data(answering.by_task(samples))
    distributed.require_equal("program", distributed.code_version())
    distributed.require_equal("command", asked)
    distributed.require_equal("dataset", {"number": len(samples), "hash": data})
    model = load_model(
        options.checkpoint,
        console,
        precision=options.precision,
        strategy=options.strategy,
        mesh=options.mesh,
    )
    config = {
        "checkpoint": model.checkpoint_hash,
        "path": shown(options.checkpoint),
        "data": data,
        "folder": shown(options.data),
        "format": options.format,
        "split": options.split,
        "datasets": sorted(options.datasets),
        "conditioning": options.conditioning,
        "precision": dataclasses.asdict(model.precision),
        "max_new_tokens": options.max_new_tokens,
        "strategy": options.strategy,
        "mesh": options.mesh,
        "device": jax.local_devices()[0].device_kind,
        "versions": scoring.versions(),
    }
    done = distributed.first_says(lambda: _begin(options, config, samples))
    own = set(distributed.share(list(dict.fromkeys(sample.image for sample in samples))))
    todo = [s for s in samples if s.image in own and s.doc_id not in done.get(s.task, ())]
    count = sum(map(len, done.values()))
    if count:
        _say(f"{count} of {len(samples)} already answered in {shown(options.out)}.")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    asker = answering.Asker(
        model,
        readers.image_folder(options.data),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        grounded=options.strategy is not None,
        conditioning=options.conditioning,
    )
    with bar:
        for _ in bar.track(
            answering.answer_all(asker, options.out, todo), total=len(todo), description="Answering"
        ):
            pass
    distributed.wait_for_all()
    failed = 0
    if distributed.is_first():
        merged = answering.merge(options.out, samples)
        failures = [s for of_task in merged.values() for s in of_task if s.reason is not None]
        failed = len(failures)
        for sample in failures[:NAMED]:
            _say(f"Not answered: {shown(sample.doc_id)} ({sample.reason})")
        more = f", {failed} not; the same command asks them again" if failed else ""
        _say(f"{len(samples) - failed} answered{more}.")
    console.print(INTENDED_USE, style="italic")
    return distributed.first_says(lambda: failed)


def _begin(options: EvalOptions, config: dict, samples: list) -> dict[str, list[str]]:
    """Write config.json, and say what of a run is done.

    Raises:
        InputError: another model answered in this folder, or the same one in another way.
    """
    from unibiomed_jax.evaluation import answering

    path = options.out / CONFIG
    options.out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = read_json(path)
        for name in ANSWERS_DEPEND_ON:
            if before.get(name) != config[name]:
                raise InputError(
                    f"{shown(options.out)} has answers with the {name} {shown(str(before.get(name)))}, not "
                    f"{shown(str(config[name]))}; choose another --out."
                )
    write_beside(path, json.dumps(config, indent=1).encode())
    return {task: sorted(names) for task, names in answering.resume(options.out, samples).items()}


def _say(sentence: str) -> None:
    console.print(escape(sentence), highlight=False, soft_wrap=True)


def _folders(options: EvalOptions) -> tuple[Path, Path, str]:
    return options.data, options.predictions, options.split


def _check(options: EvalOptions) -> None:
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1.")
    if options.mesh is not None and options.strategy is None:
        raise InputError(f"--mesh {options.mesh} spreads a strategy over devices; add --strategy.")
    if options.checkpoint is None:
        if options.mode == "infer":
            raise InputError("--mode infer asks a model; name it with --checkpoint.")
    else:
        if options.mode == "score":
            raise InputError("--mode score asks no model; leave out --checkpoint, or --mode.")
        if options.predictions is not None:
            raise InputError("--predictions are answers of another system; leave out --checkpoint.")
        if in_bucket(options.out):
            raise InputError(
                f"Answers are appended to files of --out, and {options.out} lies in a bucket, where nothing "
                "can be; choose a folder on a disk."
            )
        if options.data is None:
            raise InputError("--checkpoint is asked about a dataset; name its folder with --data.")
        return
    if options.predictions is None:
        if options.data is not None:
            raise InputError(
                "--data belongs to --checkpoint or --predictions; name one of them, or leave it out."
            )
        return
    if options.folders is not None:
        raise InputError("--folders writes the predictions of a run; leave out --predictions.")
    if len(options.task) != 1:
        raise InputError("--predictions holds those of one task; name it with --task.")
    if options.data is None:
        raise InputError(
            "--predictions are compared with the truth of a dataset; name its folder with --data."
        )


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


def list_known(options: ListOptions) -> int:
    """Run `unibiomed eval list`."""
    from unibiomed_jax.evaluation.readers.known import known_datasets

    del options
    for known in known_datasets():
        _say(f"{known.name}: --format {known.format}; {known.tasks}; --split {known.splits}")
        _say(f"    licence: {known.licence}")
        _say(f"    from: {known.where}")
    return DONE


def reproduce(options: ReproduceOptions) -> int:
    """Run `unibiomed eval reproduce`; FAILED_IN_PART if something could not be answered or scored."""
    from unibiomed_jax.evaluation import published, scoring
    from unibiomed_jax.evaluation.readers.reference import reference_datasets

    there = [
        dataset
        for dataset in reference_datasets()
        if dataset.evaluated
        and (not options.task or dataset.task in options.task)
        and dataset.config(options.data, "test").annotation_path.is_file()
    ]
    if not there:
        raise InputError(
            f"{shown(options.data)} holds no test set of {', '.join(options.task) or 'UniBiomed'} (such as "
            "ACDC/test.json); name the folder Biomed with --data."
        )
    tasks = tuple(dict.fromkeys(dataset.task for dataset in there))
    evaluate(
        EvalOptions(
            out=options.out,
            checkpoint=options.checkpoint,
            mode="infer",
            task=tasks,
            data=options.data,
            format="reference",
            batch_size=options.batch_size,
            precision=options.precision,
            conditioning="first",
        )
    )
    found = published.reproduce(scoring.read_run(options.out, tasks))
    about = {"checkpoint": read_json(options.out / CONFIG)["checkpoint"], **scoring.versions()}
    page, table = options.out / "published_numbers.md", options.out / "published_numbers.csv"
    write_beside(page, published.render(found, about).encode())
    write_beside(table, published.to_csv(found, about).encode())
    for (task, dataset), result in found.items():
        if result.unscored:
            _say(f"{task}, {shown(dataset)}: {len(result.unscored)} not scored.")
    _say(f"{len(found)} tables. Written: {shown(page)}")
    return FAILED_IN_PART if any(result.unscored for result in found.values()) else DONE


def compare(options: CompareOptions) -> int:
    """Run `unibiomed eval compare`."""
    from unibiomed_jax.evaluation import scoring
    from unibiomed_jax.evaluation.compare import compare as compare_runs
    from unibiomed_jax.evaluation.compare import write_csv
    from unibiomed_jax.evaluation.page import write_comparison

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
    if options.page is not None:
        write_comparison(options.page, differences, (options.first, options.second))
    return DONE
