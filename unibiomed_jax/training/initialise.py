"""The parameters a run starts from: random ones, or those of a converted checkpoint with new adapters."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from unibiomed_jax import checkpoint, sharding
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.parameters import Parameters, partition, split

# Last layers of the two heads that no loss reaches: they start, and stay, at "the masks are equally good, so
# take the first" and "the object is in sight".
UNTAUGHT_HEADS = {
    "sam2.sam_mask_decoder.iou_prediction_head.layers.2": 0.0,
    "sam2.sam_mask_decoder.pred_obj_score_head.layers.2": 1.0,
}


def resolve_model(config: TrainConfig) -> TrainConfig:
    """The configuration with the sizes of the checkpoint it starts from, and its own precision."""
    model = checkpoint.read_config(config.initial) if config.initial else config.model
    return dataclasses.replace(config, model=dataclasses.replace(model, precision=config.precision))


def build_model(config: TrainConfig) -> UniBiomedModel:
    """A model with random parameters and its adapters."""
    model = UniBiomedModel(config.model, rngs=nnx.Rngs(config.seed))
    settings = config.lora
    if settings.rank:
        lora.attach(
            model,
            settings.targets,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            rngs=nnx.Rngs(config.seed + 1),
        )
        head = model.language_model.lm_head
        if head is not None and head.lora is not None:
            raise InputError("language_model.lm_head cannot be adapted: train it whole, or leave it frozen.")
    return model


def structure(config: TrainConfig) -> tuple[nnx.GraphDef, Parameters]:
    """Structure of the model and shapes of its parameters; nothing is allocated."""
    return split(nnx.eval_shape(lambda: build_model(config)))


def random_parameters(config: TrainConfig) -> Parameters:
    """All parameters, drawn from the seed; kernels with variance 1 / fan-in, which suits any width.

    The kernels are slices of one long draw: a program with a draw for each takes minutes to compile.
    """
    _, shapes = structure(config)
    kernels = {path: value.shape for path, value in shapes.items() if path.endswith(".kernel")}

    def draw() -> Parameters:
        _, parameters = split(build_model(config))
        ends = np.cumsum([math.prod(shape) for shape in kernels.values()])
        numbers = jax.random.normal(jax.random.key(config.seed), (ends[-1],))
        for (path, shape), part in zip(kernels.items(), jnp.split(numbers, ends[:-1]), strict=True):
            parameters[path] = part.reshape(shape) * fan_in(path, shape) ** -0.5
        for head, says in UNTAUGHT_HEADS.items():
            parameters[f"{head}.kernel"] = jnp.zeros(kernels[f"{head}.kernel"])
            parameters[f"{head}.bias"] = jnp.full(shapes[f"{head}.bias"].shape, says)
        return parameters

    return jax.jit(draw)()


def fan_in(path: str, shape: tuple[int, ...]) -> int:
    """How many inputs an output of the kernel at a dotted path sums over."""
    *inputs, _ = shape[sharding.logical_axes(path, len(shape))[0] == "layer" :]
    return inputs[0] if "upscale" in path else math.prod(inputs)  # an upscaled cell sees one cell


def starting_parameters(
    config: TrainConfig, mesh: Mesh, strategy: sharding.Strategy
) -> tuple[Parameters, Parameters]:
    """(trainable in float32, frozen in its storage dtype), laid out on the devices.

    Raises:
        InputError: the checkpoint cannot be used, or a pattern of `freeze` fits nothing.
    """

    def layout(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, sharding.partition_spec(path, shape, strategy, mesh))

    if config.initial:
        loaded = checkpoint.load(config.initial, sharding=layout)
        parameters = checkpoint.flatten(loaded.params)
        if config.lora.rank:
            parameters |= jax.jit(lambda: only_adapters(split(build_model(config))[1]))()
    else:
        parameters = random_parameters(config)
    trainable, frozen = partition(parameters, config.freeze.trainable, config.freeze.frozen)
    del parameters

    @functools.partial(jax.jit, static_argnums=1)
    def cast(value, dtype):
        return value.astype(dtype)

    def place(table: Parameters, dtype: str) -> Parameters:
        return {
            path: cast(jax.device_put(value, layout(path, value.shape)), dtype)
            for path, value in table.items()
        }

    return place(trainable, "float32"), place(frozen, config.freeze.frozen_dtype)


def only_adapters(parameters: Parameters) -> Parameters:
    """The adapters among the parameters."""
    return {path: value for path, value in parameters.items() if ".lora." in path}
