"""Train a model: python train.py configs/unibiomed_tiny/1_base.py [--optim.lr=1e-5 ...]

The same command goes on where a run stopped: after its end, a kill, or SIGTERM (saved, exit code 0).
"""

from __future__ import annotations

import sys

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unibiomed_jax import distributed, runtime
from unibiomed_jax.commands.plan import plan_run
from unibiomed_jax.commands.run import run
from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.data.pipeline import Batch, Pipeline
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import locate
from unibiomed_jax.training.ahead import compile_ahead
from unibiomed_jax.training.config import Acts
from unibiomed_jax.training.experiment import load_command, main_arguments, processes_of
from unibiomed_jax.training.export import export_checkpoint, export_model
from unibiomed_jax.training.footprint import footprint
from unibiomed_jax.training.log import RunLog
from unibiomed_jax.training.meter import Meter
from unibiomed_jax.training.signals import Stop, stop_at_once
from unibiomed_jax.training.snapshot import Checkpointer
from unibiomed_jax.training.start import (
    Start,
    belongs_to,
    going_on,
    open_data,
    prepare,
    settings,
    share_of_rows,
    starting_state,
    summary,
    together,
)
from unibiomed_jax.training.step import TrainStep
from unibiomed_jax.training.validation import Validation, build_validation, is_best

console = Console()  # of several processes the first one speaks

# First and last update after a start that --profile traces.
PROFILED = (10, 14)


def main() -> int:
    # Configuration, model, layout
    path, arguments = main_arguments()
    distributed.join(processes_of(arguments))  # first: a configuration may ask what devices there are
    config, acts = load_command(path, arguments)
    if not acts.export:
        stop_at_once()
    distributed.require_equal("program", distributed.code_version())
    distributed.require_equal("configuration", settings(config))
    console.quiet = not distributed.is_first()
    if acts.topology:
        if not acts.dry_run:
            raise InputError("--topology plans a run for chips that are not here; add --dry-run.")
        return plan_run(config, acts.topology)
    runtime.prepare()
    start = prepare(config)
    config, layout, folder = start.config, start.layout, locate(config.folder)
    if acts.export:
        update = export_checkpoint(start, acts.export)
        console.print(f"The model of update {update} is in {folder / 'model'}.")
        return 0
    if acts.profile and config.optim.steps < PROFILED[-1]:
        raise InputError(
            f"--profile traces the updates {PROFILED[0]} to {PROFILED[-1]} after a start; raise "
            f"--optim.steps from {config.optim.steps}."
        )

    # Data
    share = share_of_rows(layout, config.data.batch_size)
    data = open_data(config, start.tokenizer, training=True, share=share)
    held_out = None
    if config.validation:
        held_out = open_data(config, start.tokenizer, training=False, share=share)
    fingerprints = {"training data": data.fingerprint, "validation data": held_out and held_out.fingerprint}
    distributed.require_equal("data set", fingerprints)

    # State: the newest checkpoint of this run, or the start
    step = TrainStep(start.graphdef, config, start.ids, layout)
    if acts.dry_run:
        table, seconds = footprint(start, step, data)
        for sentence in summary(start, data):
            console.print(sentence)
        console.print(table, f"Compiled in {seconds:.0f} s.")
        return 0
    checkpointer = Checkpointer(start.checkpoint_folder, config.checkpoint)
    with checkpointer.claim():
        return train(start, acts, step, data, held_out, checkpointer)


def train(
    start: Start,
    acts: Acts,
    step: TrainStep,
    data: Pipeline,
    held_out: Pipeline | None,
    checkpointer: Checkpointer,
) -> int:
    """Train in a folder that is this job's own, from its newest checkpoint or from the start."""
    config, layout, folder = start.config, start.layout, locate(start.config.folder)
    stop = Stop()
    belongs = belongs_to(config)  # read once: what lies in `initial` may change while this run goes on
    distributed.require_equal("start", belongs)
    restored, state, frozen = starting_state(start, checkpointer, belongs)
    iterator = iter(data)
    if restored is not None:
        iterator.set_state(restored.position)
        console.print(going_on(restored, config), highlight=False, markup=False, soft_wrap=True)
    for sentence in summary(start, data):
        console.print(sentence)
    # Not on CPUs, whose cores train, nor on GPUs, on which compilers take times that others would spoil.
    if layout.platform == "tpu":
        seconds = compile_ahead(config, layout, step, state, frozen, data.plan.shapes)
        console.print(f"Shapes of batches compiled: {len(data.plan.shapes)}, in {seconds:.0f} s.")
    first = int(state.step)
    tracing = acts.profile and config.optim.steps - first >= PROFILED[-1]
    if acts.profile and not tracing:
        console.print("Too few updates are left to profile them.")

    # Loop
    log = RunLog(folder, tensorboard=config.log.tensorboard, first_step=first)
    _, hosts = share_of_rows(layout, config.data.batch_size)
    measure = build_validation(start.graphdef, config, start.ids, layout)
    validation = None if held_out is None else Validation(config, held_out, measure, layout, log)
    meter = Meter(config, start.trainable, layout.mesh.size, readers=jax.process_count() // hosts)
    previous: tuple[dict, list[Batch]] | None = None

    def save(measures: dict | None = None) -> None:
        tree = {"train": state, "frozen": frozen} if config.checkpoint.save_frozen else {"train": state}
        log.flush()
        checkpointer.save(
            int(state.step),
            tree,
            position=together(distributed.gather(iterator.get_state())),
            config=to_dict(config),
            tokenizer=start.tokenizer_folder,
            measures=measures,
            belongs_to=belongs,
        )

    with log, checkpointer, progress_bar() as bar:
        task = bar.add_task("training", total=config.optim.steps, completed=first)
        for update in range(first + 1, config.optim.steps + 1):
            batches = [next(iterator) for _ in range(config.optim.accumulate)]
            if tracing and update == first + PROFILED[0]:
                log.start_trace()
            state, metrics = step(state, frozen, [layout.place_batch(batch.arrays) for batch in batches])
            if tracing and update == first + PROFILED[-1]:
                jax.block_until_ready(state)
                log.stop_trace()
            # Looking at the update before keeps the device busy with this one meanwhile.
            if previous is not None:
                require_finite(config.max_bad_steps, log, update - 1, *previous)
            previous = (metrics, batches)
            meter.add(batches)
            checkpointer.check()

            last = update == config.optim.steps
            if update % config.log.every == 0 or last:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                values |= meter.rates()
                log.write(update, "train", values)
                bar.update(task, description=f"loss {values['loss']:.4f}")
            bar.update(task, completed=update)
            due = config.log.validate_every and (update % config.log.validate_every == 0 or last)
            measures = None
            if validation is not None and due:
                measures = validation(update, state, frozen, stop.agreed)
                show(update, measures or {})
                meter.restart()
            best = is_best(checkpointer, config, measures)
            stopping = stop.agreed()
            if update % config.checkpoint.every == 0 or last or best or stopping:
                require_finite(config.max_bad_steps, log, update, *previous)
                previous = None
                save(measures)
                meter.restart()
            if stopping and not last:
                checkpointer.wait()
                console.print(f"Stopped by a signal; update {update} is saved, the same command goes on.")
                return 0
    iterator.close()
    export_model(folder, config, state, frozen, start.tokenizer_folder)
    console.print(f"The trained model is in {folder / 'model'}.")
    return 0


def require_finite(limit: int, log: RunLog, update: int, metrics: dict, batches: list[Batch]) -> None:
    """Name the samples of an update that was not applied; stop the run after `limit` of them in a row."""
    bad = int(metrics["bad_steps"])
    if not bad:
        return
    own = [name for batch in batches for name in batch.names if name]
    names = list(dict.fromkeys(name for names in distributed.gather(own) for name in names))
    log.write(update, "skipped", {"bad_steps": bad, "samples": names})
    console.print(
        f"Update {update} was skipped: its loss or gradient is not finite. Samples: {', '.join(names)}"
    )
    if bad >= limit:
        raise InputError(
            f"The loss was not finite {bad} times in a row, the last time for {', '.join(names)}; look at "
            "these samples or lower --optim.lr."
        )


def show(update: int, measures: dict[str, float]) -> None:
    """The main measures of a validation, for the terminal."""
    shown = {name: value for name, value in measures.items() if name in ("loss", "dice") or "answers" in name}
    if shown:
        console.print(
            f"Update {update}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
        )


def progress_bar() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(run(main))
