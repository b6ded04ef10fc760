"""The first act of `unibiomed eval`: a model answers the records of a dataset."""

from __future__ import annotations

import dataclasses
import json

from unibiomed_jax import distributed
from unibiomed_jax.commands.eval.options import EvalOptions
from unibiomed_jax.commands.eval.printing import NAMED, console, say
from unibiomed_jax.commands.model import load_model
from unibiomed_jax.commands.progress import progress_bar
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import read_json, shown, write_beside

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


def answer(options: EvalOptions) -> int:
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
        say(f"{count} of {len(samples)} already answered in {shown(options.out)}.")
    bar = progress_bar(console)
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
            say(f"Not answered: {shown(sample.doc_id)} ({sample.reason})")
        more = f", {failed} not; the same command asks them again" if failed else ""
        say(f"{len(samples) - failed} answered{more}.")
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
