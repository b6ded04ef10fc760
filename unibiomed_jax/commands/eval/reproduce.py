"""`unibiomed eval reproduce`: a model's numbers beside the published ones."""

from __future__ import annotations

from unibiomed_jax.commands.eval.answer import CONFIG
from unibiomed_jax.commands.eval.options import EvalOptions, ReproduceOptions
from unibiomed_jax.commands.eval.printing import say
from unibiomed_jax.commands.eval.run import evaluate
from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import read_json, shown, write_beside


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
            say(f"{task}, {shown(dataset)}: {len(result.unscored)} not scored.")
    say(f"{len(found)} tables. Written: {shown(page)}")
    return FAILED_IN_PART if any(result.unscored for result in found.values()) else DONE
