"""Train a model: python train.py configs/tiny.py [--optim.lr=1e-5 ...]

The same command goes on where a run stopped: after its end, a kill, or SIGTERM (saved, exit code 0).
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from unibiomed_jax import checkpoint, runtime, sharding
from unibiomed_jax.config import to_dict
from unibiomed_jax.data.pipeline import Batch, Pipeline, collate
from unibiomed_jax.data.plan import Shape
from unibiomed_jax.data.transforms import SampleConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.tokenizer import Tokenizer
from unibiomed_jax.training import flops
from unibiomed_jax.training.checkpoint import NO_SPACE, Checkpointer, Restored
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.experiment import load_experiment, main_arguments
from unibiomed_jax.training.export import export_model, trained_parameters
from unibiomed_jax.training.forward import TokenIds
from unibiomed_jax.training.initialise import resolve_model, starting_parameters, structure
from unibiomed_jax.training.log import RunLog, mask_picture
from unibiomed_jax.training.metrics import build_validation, summarise
from unibiomed_jax.training.parameters import count, partition
from unibiomed_jax.training.step import TrainState, TrainStep, init_state, place_batch

console = Console()

# First and last update after a start that --profile traces.
PROFILED = (10, 14)
# Fields of a sample that follow from the model, and what of the model decides them.
SAMPLE_SIZES = {
    "tile_size": "vision.image_size",
    "tokens_per_tile": "vision.image_size with its patch_size and downsample_ratio",
    "min_tiles": "min_tiles",
    "max_tiles": "max_tiles",
    "use_thumbnail": "use_thumbnail",
    "sam_size": "sam2.image_size",
    "mask_size": "sam2.image_size",
}


def main() -> int:
    # Configuration
    file, options = main_arguments()
    config = resolve_model(load_experiment(file, options))
    if not config.export:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # nothing to save yet
    runtime.prepare()

    # Mesh
    mesh, strategy = sharding.make_mesh(), sharding.find_strategy(config.strategy)
    sharding.require_divisible(config.data.batch_size, strategy, mesh)

    # Model; exporting a checkpoint of it needs no data
    tokenizer_folder = find_tokenizer(config)
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise InputError(
            f"The tokenizer in {tokenizer_folder} has {tokenizer.vocab_size} tokens but the model only "
            f"{config.model.language.vocab_size}; set --model.language.vocab-size or take its tokenizer."
        )
    ids = TokenIds(tokenizer.image_context_id, tokenizer.seg_id)
    graphdef, shapes = structure(config)
    abstract = abstract_state(config, shapes, mesh, strategy)
    folder = Path(config.folder)
    if config.export:
        checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint)
        chosen = chosen_step(checkpointer, config.export)
        restored, state, frozen = starting_state(
            config, checkpointer, abstract, mesh, strategy, foundation(config), chosen
        )
        export_model(folder, config, state, frozen, tokenizer_folder)
        console.print(f"The model of update {restored.step} is in {folder / 'model'}.")
        return 0

    if config.profile and config.optim.steps < PROFILED[-1]:
        raise InputError(
            f"--profile traces the updates {PROFILED[0]} to {PROFILED[-1]} after a start; raise "
            f"--optim.steps from {config.optim.steps}."
        )

    # Data
    data = open_data(config, tokenizer, training=True)
    validation = open_data(config, tokenizer, training=False) if config.validation else None

    # State: the newest checkpoint of this run, or the start
    step = TrainStep(graphdef, config, ids, mesh, strategy)
    if config.dry_run:
        return report_memory(config, step, abstract, data, mesh, strategy)
    stop = stop_on_signals()
    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint)
    checkpointer.claim()
    belongs_to = foundation(config)  # read once: what lies in `initial` may change while this run goes on
    restored, state, frozen = starting_state(config, checkpointer, abstract, mesh, strategy, belongs_to)
    iterator = iter(data)
    if restored is not None:
        iterator.set_state(restored.position)
        console.print(f"Going on after update {restored.step} of {config.optim.steps}.")
    describe(config, abstract, data, mesh)
    start = int(state.step)
    profile = config.profile and config.optim.steps - start >= PROFILED[-1]
    if config.profile and not profile:
        console.print("Too few updates are left to profile them.")

    # Loop
    log = RunLog(folder, tensorboard=config.log.tensorboard, first_step=start)
    measure = build_validation(graphdef, config, ids)
    meter = Meter(config, list(abstract["train"].trainable), mesh.size)
    previous: tuple[dict, list[Batch]] | None = None

    def save(measures: dict | None = None) -> None:
        tree = {"train": state, "frozen": frozen} if config.checkpoint.save_frozen else {"train": state}
        checkpointer.save(
            int(state.step),
            tree,
            position=iterator.get_state(),
            config=to_dict(config),
            tokenizer=tokenizer_folder,
            measures=measures,
            belongs_to=belongs_to,
        )

    with checkpointer, progress_bar() as bar:
        task = bar.add_task("training", total=config.optim.steps, completed=start)
        for update in range(start + 1, config.optim.steps + 1):
            batches = [next(iterator) for _ in range(config.optim.accumulate)]
            if profile and update == start + PROFILED[0]:
                jax.profiler.start_trace(str(folder / "profile"))
            arrays = [place_batch(batch.arrays, strategy, mesh) for batch in batches]
            state, metrics = step(state, frozen, arrays)
            if profile and update == start + PROFILED[-1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            # Looking at the update before keeps the device busy with this one meanwhile.
            if previous is not None:
                refuse_bad_steps(config, log, update - 1, *previous)
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
                measures = validate(
                    config, measure, validation, state, frozen, log, update, strategy, mesh, stop
                )
                meter.restart()
            best = measures is not None and is_best(checkpointer, config, measures)
            stopping = stop.is_set()
            if update % config.checkpoint.every == 0 or last or best or stopping:
                refuse_bad_steps(config, log, update, *previous)
                previous = None
                save(measures)
                meter.restart()
            if stopping and not last:
                checkpointer.wait()
                console.print(f"Stopped by a signal; update {update} is saved, the same command goes on.")
                return 0
    iterator.close()
    log.close()
    export_model(folder, config, state, frozen, tokenizer_folder)
    console.print(f"The trained model is in {folder / 'model'}.")
    return 0


def find_tokenizer(config: TrainConfig) -> Path:
    """The tokenizer's folder: its own field, or the one of the checkpoint the run starts from."""
    if config.tokenizer:
        return Path(config.tokenizer)
    if config.initial:
        return Path(config.initial) / "tokenizer"
    raise InputError("A run from random parameters needs --tokenizer, the folder of a tokenizer's files.")


def open_data(config: TrainConfig, tokenizer: Tokenizer, *, training: bool) -> Pipeline:
    """The pipeline of the training or of the validation data; sizes of arrays come from the model.

    Raises:
        InputError: other sizes were given, a dataset cannot be read, or there is none.
    """
    defaults, sizes = SampleConfig(), SampleConfig.from_model(config.model)
    for name, source in SAMPLE_SIZES.items():
        given, size = getattr(config.data.sample, name), getattr(sizes, name)
        if given not in (size, getattr(defaults, name)):
            raise InputError(
                f"--data.sample.{name}={given} would have no effect, since the model's {source} decides it "
                f"(here {size}); leave it out."
            )
    sample = dataclasses.replace(config.data.sample, **{name: getattr(sizes, name) for name in SAMPLE_SIZES})
    settings = dataclasses.replace(config.data, sample=sample, training=training)
    if not training:
        settings = dataclasses.replace(settings, datasets=config.validation, workers=0)
    if not settings.datasets:
        raise InputError("There is no training data: list datasets in the configuration's data.datasets.")
    return Pipeline(settings, tokenizer, host=jax.process_index(), hosts=jax.process_count())


def starting_state(
    config: TrainConfig,
    checkpointer: Checkpointer,
    abstract: dict,
    mesh,
    strategy,
    belongs_to: dict,
    chosen: int | None = None,
) -> tuple[Restored | None, TrainState, dict]:
    """What the run goes on from: a checkpoint (None: the start), the train state, the frozen parameters."""
    wanted = abstract if config.checkpoint.save_frozen else {"train": abstract["train"]}
    restored = checkpointer.restore(wanted, chosen, belongs_to)
    if restored is not None and config.checkpoint.save_frozen:
        return restored, restored.state["train"], restored.state["frozen"]
    trainable, frozen = starting_parameters(config, mesh, strategy)
    if restored is not None:
        return restored, restored.state["train"], frozen
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract["train"])
    state = jax.jit(lambda table: init_state(table, config), out_shardings=layout)(trainable)
    return None, state, frozen


def foundation(config: TrainConfig) -> dict:
    """What must be the same where a checkpoint is restored, by name: model, adapters, what stays frozen."""
    model = {
        f"model.{name}": value
        for name, value in checkpoint.flatten(to_dict(config.model)).items()
        if not name.startswith("precision.")
    }
    lora = {"lora.rank": config.lora.rank, "lora.alpha": config.lora.alpha} if config.lora.rank else {}
    if config.checkpoint.save_frozen:
        return model | lora
    # The frozen parameters are not in it: they are read, or drawn, anew.
    initial = checkpoint.read_manifest(config.initial).hash if config.initial else f"seed {config.seed}"
    return model | lora | {"initial": initial}


def abstract_state(config: TrainConfig, shapes: dict, mesh, strategy) -> dict:
    """Shapes, dtypes and layouts of the train state and of what is frozen."""
    trainable, frozen = partition(shapes, config.freeze.trainable, config.freeze.frozen)
    frozen = {
        path: jax.ShapeDtypeStruct(value.shape, np.dtype(config.freeze.frozen_dtype))
        for path, value in frozen.items()
    }
    tree = {"train": jax.eval_shape(lambda: init_state(zeros(trainable), config)), "frozen": frozen}
    return laid_out(tree, strategy, mesh)


def laid_out(tree, strategy, mesh):
    """A tree of abstract arrays with their layout on the devices."""
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        tree,
        sharding.tree_shardings(tree, strategy, mesh),
    )


def zeros(table: dict) -> dict:
    return {path: jax.numpy.zeros(value.shape, value.dtype) for path, value in table.items()}


def chosen_step(checkpointer: Checkpointer, export: str | None) -> int | None:
    """The checkpoint that `export` names; None is the newest undamaged one.

    Raises:
        InputError: there is no such checkpoint.
    """
    steps = checkpointer.steps()
    if export is None or (export == "last" and steps):
        return None
    named = {"best": checkpointer.best()} | {str(step): step for step in steps}
    if named.get(export) is None:
        raise InputError(
            f"There is no checkpoint {export!r} in {checkpointer.folder}; it holds {steps or 'none'}."
        )
    return named[export]


def describe(config: TrainConfig, abstract: dict, data: Pipeline, mesh) -> None:
    """Say what will run."""
    language = config.model.language
    padding = language.padded_vocab_size - language.vocab_size
    trainable = count(abstract["train"].trainable, padding)
    total = trainable + count(abstract["frozen"], padding)
    console.print(
        f"{trainable:,} of {total:,} parameters train on {mesh.size} {mesh.devices.flat[0].device_kind}, "
        f"{len(data.mixture.records):,} records, {data.steps_per_epoch:,} batches an epoch, "
        f"{config.optim.steps:,} updates of {config.optim.accumulate} batches of {config.data.batch_size}."
    )


def heaviest(config: TrainConfig, shapes: Sequence[Shape], trainable: Collection[str]) -> Shape:
    """The shape of the batch that asks for most arithmetic when every slot of it is taken."""

    def work(shape: Shape) -> float:
        slots = {
            "tile_valid": shape.tiles,
            "token_valid": shape.tokens,
            "labels": shape.tokens,
            "frame_valid": shape.frames,
            "object_valid": shape.objects,
        }
        full = {name: np.ones((config.data.batch_size, count), np.int32) for name, count in slots.items()}
        return flops.step_flops(flops.forward_work(config.model, full, config.lora.rank), trainable)

    return max(shapes, key=work)


def report_memory(config, step: TrainStep, abstract: dict, data: Pipeline, mesh, strategy) -> int:
    """Compile the step for the heaviest batch and print what a device must hold."""
    state, frozen = abstract["train"], abstract["frozen"]
    shape = heaviest(config, data.plan.shapes, state.trainable)
    blank = collate([None] * config.data.batch_size, shape, data.config.sample)
    layout = sharding.batch_sharding(strategy, mesh)
    arrays = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout) for name, value in blank.items()
    }
    parts = {
        "trainable parameters": state.trainable,
        "optimiser": state.moments,
        "frozen parameters": frozen,
        "batch": arrays,
    }
    if state.average is not None:
        parts["running average"] = state.average
    if config.optim.accumulate == 1:
        program, arguments = step.whole, (state, frozen, arrays)
    else:
        total = laid_out(jax.eval_shape(step.nothing, state.trainable), strategy, mesh)
        parts["gradient total"] = total
        counts, index = jax.eval_shape(step.count, arrays), jax.ShapeDtypeStruct((), np.int32)
        program, arguments = step.accumulate, (total, state, frozen, arrays, counts, index)
    started = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    seconds = time.perf_counter() - started
    table = Table("part", "MiB a device", title="Memory of one update")
    for name, tree in parts.items():
        table.add_row(name, f"{device_bytes(tree) / 2**20:,.1f}")
    analysis = compiled.memory_analysis()
    table.add_row("gradients and activations", f"{analysis.temp_size_in_bytes / 2**20:,.1f}")
    console.print(table, f"Compiled in {seconds:.0f} s.")
    return 0


def device_bytes(tree) -> int:
    """Bytes a device holds of a tree of abstract arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


class Meter:
    """Speed since the last report, validation and saving not counted."""

    def __init__(self, config: TrainConfig, trainable: list[str], devices: int):
        self.config, self.trainable = config, trainable
        peak = flops.peak_flops(jax.devices()[0])
        self.peak = None if peak is None else peak * devices
        self.restart()

    def restart(self) -> None:
        self.started, self.images, self.tokens, self.work = time.perf_counter(), 0, 0, 0.0

    def add(self, batches: list[Batch]) -> None:
        hosts = jax.process_count()
        for batch in batches:
            shown = np.maximum(
                batch.arrays["frame_valid"].sum(axis=1), 1
            )  # a volume is as many as its slices
            self.images += hosts * int(shown[[bool(name) for name in batch.names]].sum())
            self.tokens += hosts * int(batch.arrays["token_valid"].sum())
            work = flops.forward_work(self.config.model, batch.arrays, self.config.lora.rank)
            self.work += hosts * flops.step_flops(work, self.trainable)

    def rates(self) -> dict[str, float]:
        """Images, tokens and operations a second, and the share of the devices' peak if that is known."""
        seconds = time.perf_counter() - self.started
        rates = {
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
            "teraflops": self.work / seconds / 1e12,
        }
        if self.peak is not None:
            rates["mfu"] = self.work / seconds / self.peak
        self.restart()
        return rates


def refuse_bad_steps(
    config: TrainConfig, log: RunLog, update: int, metrics: dict, batches: list[Batch]
) -> None:
    """Name the samples of an update that was not applied; stop the run when there are too many in a row."""
    bad = int(metrics["bad_steps"])
    if not bad:
        return
    names = [name for batch in batches for name in batch.names if name]
    log.write(update, "skipped", {"bad_steps": bad, "samples": names})
    console.print(
        f"Update {update} was skipped: its loss or gradient is not finite. Samples: {', '.join(names)}"
    )
    if bad >= config.max_bad_steps:
        raise InputError(
            f"The loss was not finite {bad} times in a row, the last time for {', '.join(names)}; look at "
            "these samples or lower --optim.lr."
        )


def validate(
    config, measure, data: Pipeline, state: TrainState, frozen, log, update, strategy, mesh, stop
) -> dict | None:
    """Measure on the validation data and keep a few pictures; None if `stop` is set meanwhile."""
    kinds = {record.name: str(record.kind) for record in data.mixture.records}
    measured, pictures = [], 0
    for number, batch in zip(range(config.log.validate_batches), data, strict=False):
        if stop.is_set():
            return None
        result = measure(trained_parameters(state), frozen, place_batch(batch.arrays, strategy, mesh))
        if pictures < config.log.overlays and batch.arrays["masks"].size:
            for row in np.flatnonzero(np.asarray(result.dice_valid)[:, 0, 0])[
                : config.log.overlays - pictures
            ]:
                picture = mask_picture(
                    batch.arrays["sam_pixels"][row, 0],
                    batch.arrays["masks"][row, 0, 0] > 0,
                    np.asarray(result.masks[row, 0, 0]),
                )
                log.picture(update, f"{number}-{row}", picture)
                pictures += 1
        measured.append((result._replace(masks=None), batch.names))
    measures = summarise(measured, kinds, config)
    log.write(update, "validation", measures)
    shown = {name: value for name, value in measures.items() if name in ("loss", "dice") or "answers" in name}
    console.print(f"Update {update}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    return measures


def is_best(checkpointer: Checkpointer, config: TrainConfig, measures: dict) -> bool:
    """Whether a state with these measures should be kept as the best so far."""
    checkpointer.wait()
    best, name = checkpointer.best(), config.checkpoint.best
    if name not in measures or not config.checkpoint.keep_best:
        return False
    return best is None or measures[name] > checkpointer.measures(best)[name]


def stop_on_signals() -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets; a second SIGINT interrupts at once."""
    stop = threading.Event()

    def request(number, _frame):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)
    return stop


def progress_bar() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
    )


def command() -> int:
    """`main`, with what the user must put right as one line."""
    try:
        return main()
    except InputError as error:
        reason = error
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        reason = "The disk is full; free some space, and the same command goes on from the last checkpoint."
    stderr = Console(stderr=True)
    stderr.print(f"Error: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2


if __name__ == "__main__":
    sys.exit(command())
