"""What a run starts from: its model and where it lies, its data, its state."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unibiomed_jax import checkpoint, distributed
from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.config.model import ModelConfig, require_fitting
from unibiomed_jax.data.pipeline import Pipeline
from unibiomed_jax.data.transforms import SampleSizes
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import locate
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.parameters import Parameters, count, flatten, partition, split
from unibiomed_jax.sharding.layout import Layout, parse_mesh
from unibiomed_jax.sharding.strategies import find_strategy
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.forward import TokenIds
from unibiomed_jax.training.initialise import build_model, random_parameters, structure
from unibiomed_jax.training.snapshot import Checkpointer, Restored
from unibiomed_jax.training.step import TrainState, init_state

SAM2_SIZE = "sam2.image_size"


@dataclass(frozen=True)
class Start:
    """All that a run needs before its data; nothing is allocated yet."""

    # With the sizes of the checkpoint it starts from.
    config: TrainConfig
    layout: Layout
    # Folder of the tokenizer's files.
    tokenizer_folder: Path
    tokenizer: Tokenizer
    ids: TokenIds
    # Structure of the model.
    graphdef: nnx.GraphDef
    # {"train": TrainState, "frozen": Parameters}: shapes, number formats and where they lie.
    abstract: dict

    @property
    def trainable(self) -> list[str]:
        """Paths of what trains."""
        return list(self.abstract["train"].trainable)

    @property
    def checkpoint_folder(self) -> Path:
        return locate(self.config.folder) / "checkpoints"


def prepare(config: TrainConfig) -> Start:
    """Judge a configuration and lay out what it describes.

    Raises:
        InputError: an unknown strategy, a batch that the devices cannot share, a tokenizer that does not fit
            the model, or whatever `resolve_model` refuses.
    """
    config = resolve_model(config)
    mesh = None if config.mesh is None else parse_mesh(config.mesh)
    layout = Layout.over(strategy=find_strategy(config.strategy), model=config.model, mesh=mesh)
    layout.require_divisible(config.data.batch_size)
    folder = find_tokenizer(config)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise InputError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens but the model only "
            f"{config.model.language.vocab_size}; set --model.language.vocab-size or take its tokenizer."
        )
    ids = TokenIds(tokenizer.image_context_id, tokenizer.seg_id)
    graphdef, shapes = structure(config)
    abstract = abstract_state(config, shapes, layout)
    layout.require_useful(abstract["frozen"])
    layout.require_useful(abstract["train"].trainable, "optimizer")
    return Start(config, layout, folder, tokenizer, ids, graphdef, abstract)


def resolve_model(config: TrainConfig) -> TrainConfig:
    """The configuration with the sizes of the checkpoint it starts from.

    No parameter depends on the size of SAM2's image: that may be another than the checkpoint's.

    Raises:
        InputError: there is no checkpoint or it cannot be read, or the configuration asks for another model
            than it holds, or for sizes that do not fit each other.
    """
    model = config.model
    if config.initial:
        if not checkpoint.is_checkpoint(config.initial):
            raise InputError(
                f"{config.initial} is no converted checkpoint; convert a release with `unibiomed convert "
                "from-torch`, or give RUN/model of a finished run."
            )
        model = checkpoint.read_config(config.initial)
        usual, has = (flatten(to_dict(known)) for known in (ModelConfig(), model))
        for field, asked in flatten(to_dict(config.model)).items():
            if field != SAM2_SIZE and asked not in (usual[field], has[field]):
                raise InputError(
                    f"The configuration asks for model.{field} = {asked!r} but {config.initial} has "
                    f"{has[field]!r}; leave `model` out, since a checkpoint brings its own sizes."
                )
        if config.model.sam2.image_size != ModelConfig().sam2.image_size:
            sam2 = dataclasses.replace(model.sam2, image_size=config.model.sam2.image_size)
            model = dataclasses.replace(model, sam2=sam2)
    require_fitting(model)
    return dataclasses.replace(config, model=model)


def find_tokenizer(config: TrainConfig) -> Path:
    """The tokenizer's folder: its own field, or the one of the checkpoint the run starts from."""
    if config.tokenizer:
        return locate(config.tokenizer)
    if config.initial:
        return locate(config.initial) / "tokenizer"
    raise InputError("A run from random parameters needs --tokenizer, the folder of a tokenizer's files.")


def open_data(
    config: TrainConfig, tokenizer: Tokenizer, *, training: bool, share: tuple[int, int] = (0, 1)
) -> Pipeline:
    """The pipeline of the training or of the validation data; `share` is what `share_of_rows` gives.

    Raises:
        InputError: a dataset cannot be read, or there is none.
    """
    settings = config.data
    if not training:
        settings = dataclasses.replace(settings, datasets=config.validation, workers=0)
    if not settings.datasets:
        raise InputError("There is no training data: list datasets in the configuration's data.datasets.")
    host, hosts = share
    return Pipeline(
        settings,
        SampleSizes.of(config.model),
        tokenizer,
        training=training,
        host=host,
        hosts=hosts,
    )


def share_of_rows(layout: Layout, batch_size: int) -> tuple[int, int]:
    """(which share of a batch's rows this process reads, into how many equal shares they are divided).

    Processes whose devices hold the same rows read the same.

    Raises:
        InputError: its rows do not lie side by side.
    """
    places = layout.batch.addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({row for (place,) in places for row in range(batch_size)[place]})
    if rows != list(range(rows[0], rows[-1] + 1)):
        raise InputError(
            f"The mesh gives the rows {rows} of a batch to process {jax.process_index()}, with those of "
            "others between them; put the devices of a process side by side along the axes that divide it."
        )
    return rows[0] // len(rows), batch_size // len(rows)


def summary(start: Start, data: Pipeline) -> list[str]:
    """What will run, in sentences."""
    config, layout = start.config, start.layout
    language = config.model.language
    padding = language.padded_vocab_size - language.vocab_size
    trainable, frozen = start.abstract["train"].trainable, start.abstract["frozen"]
    training = count(trainable, padding)
    sentences = [
        f"{training:,} of {training + count(frozen, padding):,} parameters train on {layout.mesh.size} "
        f"{layout.mesh.devices.flat[0].device_kind}, {len(data.mixture.records):,} records, "
        f"{data.steps_per_epoch:,} batches an epoch, {config.optim.steps:,} updates of "
        f"{config.optim.accumulate} batches of {config.data.batch_size}."
    ]
    # An axis that cannot be divided matters only where the parameter has no other divided axis.
    rows = sorted(
        layout.explain(trainable, "optimizer") + layout.explain(frozen), key=lambda row: -row.bytes_per_device
    )
    whole = [row for row in rows if row.obstacles and not any(row.spec)]
    if whole:
        size = sum(row.bytes_per_device for row in whole)
        sentences.append(
            f"{len(whole)} parameters ({size / 2**20:,.1f} MiB a device) stay whole although "
            f"{config.strategy!r} asks to divide them; the largest is {whole[0].path}: "
            f"{whole[0].obstacles[0]}."
        )
    return sentences


# ------------------------------------------------------------------------------------------------------------
# State


def abstract_state(config: TrainConfig, shapes: Parameters, layout: Layout) -> dict:
    """Shapes, number formats and layouts of the train state and of what is frozen."""
    trainable, frozen = partition(shapes, config.freeze.trainable, config.freeze.frozen)
    frozen = {
        path: jax.ShapeDtypeStruct(value.shape, np.dtype(config.freeze.frozen_dtype))
        for path, value in frozen.items()
    }

    def state() -> TrainState:
        return init_state(
            {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in trainable.items()}, config
        )

    return {
        "train": layout.abstract(jax.eval_shape(state), "optimizer"),
        "frozen": layout.abstract(frozen),
    }


def together(positions: Sequence[dict]) -> dict:
    """Where the data stands, from what every process says of its own share."""
    unreadable = {name: reason for position in positions for name, reason in position["unreadable"].items()}
    return positions[0] | {"unreadable": unreadable}


def belongs_to(config: TrainConfig) -> dict:
    """What must be the same where a checkpoint is restored, by name: model, adapters, what stays frozen."""
    model = to_dict(config.model)
    del model["preprocessing"]  # no computation depends on it
    model = {f"model.{name}": value for name, value in flatten(model).items()}
    lora = {"lora.rank": config.lora.rank, "lora.alpha": config.lora.alpha} if config.lora.rank else {}
    if config.checkpoint.save_frozen:
        return model | lora
    # The frozen parameters are not in it: they are read, or drawn, anew.
    initial = checkpoint.read_manifest(config.initial).hash if config.initial else f"seed {config.seed}"
    return model | lora | {"initial": initial}


def starting_state(
    start: Start, checkpointer: Checkpointer, belongs: dict, chosen: int | None = None
) -> tuple[Restored | None, TrainState, Parameters]:
    """What the run goes on from: a checkpoint (None: the start), the train state, the frozen parameters."""
    config, abstract = start.config, start.abstract
    wanted = abstract if config.checkpoint.save_frozen else {"train": abstract["train"]}
    restored = checkpointer.restore(wanted, chosen, belongs)
    if restored is not None and config.checkpoint.save_frozen:
        return restored, restored.state["train"], restored.state["frozen"]
    trainable, frozen = starting_parameters(config, start.layout)
    if restored is not None:
        return restored, restored.state["train"], frozen
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract["train"])
    state = start.layout.jit(lambda table: init_state(table, config), out_shardings=places)(trainable)
    return None, state, frozen


def going_on(restored: Restored, config: TrainConfig) -> str:
    """What is said where a run goes on: from where, and what is not as it was.

    Raises:
        InputError: the run has done more than it should, or its updates would be made of other batches.
    """
    steps, accumulate = config.optim.steps, config.optim.accumulate
    if restored.step > steps:
        raise InputError(
            f"The run in {config.folder} has done {restored.step} updates, more than --optim.steps={steps}; "
            f"raise it, or write the model of a checkpoint with --export."
        )
    then = restored.config.get("optim", {}).get("accumulate", accumulate)
    if then != accumulate:
        raise InputError(
            f"The run in {config.folder} makes an update of {then} batches, and --optim.accumulate="
            f"{accumulate} would change what its learning rate and its place in the data mean; leave it at "
            f"{then}, or choose another --folder."
        )
    was = flatten(restored.config)
    changed = [
        f"{name} {was[name]} -> {value}"
        for name, value in settings(config).items()
        if name in was and was[name] != value and name != "folder"
    ]
    told = f" Changed since then: {', '.join(changed)}." if changed else ""
    return f"Going on after update {restored.step} of {steps}.{told}"


def settings(config: TrainConfig) -> dict:
    """All that a configuration says, by dotted name, as JSON values, but for where data lies."""
    values = flatten(json.loads(json.dumps(to_dict(config))))
    return {name: value for name, value in values.items() if name not in ("data.datasets", "validation")}


def starting_parameters(config: TrainConfig, layout: Layout) -> tuple[Parameters, Parameters]:
    """(trainable in float32, frozen in its storage dtype), laid out on the devices.

    Raises:
        InputError: the checkpoint cannot be used, or a pattern of `freeze` fits nothing.
    """
    if config.initial:
        loaded = checkpoint.load(config.initial, sharding=layout.parameter)
        parameters = flatten(loaded.params)
        if config.lora.rank:
            parameters |= jax.jit(lambda: only_adapters(split(build_model(config))[1]))()
    else:
        parameters = random_parameters(config)
    trainable, frozen = partition(parameters, config.freeze.trainable, config.freeze.frozen)
    del parameters

    def place(table: Parameters, dtype: str) -> Parameters:
        places = layout.tree(table)
        table = {path: distributed.spread(value, places[path]) for path, value in table.items()}
        return jax.jit(functools.partial(cast, dtype=dtype), out_shardings=places)(table)

    return place(trainable, "float32"), place(frozen, config.freeze.frozen_dtype)


def cast(table: Parameters, dtype: str) -> Parameters:
    return {path: value.astype(dtype) for path, value in table.items()}


def only_adapters(parameters: Parameters) -> Parameters:
    """The adapters among the parameters."""
    return {path: value for path, value in parameters.items() if ".lora." in path}
