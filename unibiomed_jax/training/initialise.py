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
from unibiomed_jax.config import ModelConfig, Precision, require_fitting, to_dict
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.parameters import Parameters, matches, partition, split

# Last layers of the two heads that no loss reaches: they start, and stay, at "the masks are equally good, so
# take the first" and "the object is in sight".
UNTAUGHT_HEADS = {
    "sam2.sam_mask_decoder.iou_prediction_head.layers.2": 0.0,
    "sam2.sam_mask_decoder.pred_obj_score_head.layers.2": 1.0,
}

# Spread of learned positions and of the class token among them. The usual 0.02, meant for long pre-training,
# is little beside the pixels: attention would be slow to see place. The mask decoder's own tokens keep it, so
# that the language vector is heard among them.
POSITION_SPREAD = 0.5
POSITIONS = (
    "*.pos_embed",
    "*.pos_embed_window",
    "*.position_embedding",
    "*.class_embedding",
    "*.maskmem_tpos_enc",
)
# The trunk's maps are sums that no norm has passed; made so much smaller, they reach the mask decoder at the
# size of the language vector.
NECK = "*.image_encoder.neck.*"
NECK_SCALE = 0.3
# Masks start as background, as boxes do in RetinaNet (Lin et al. 2017, arXiv 1708.02002), and nearly flat.
# They have no bias: "background" would be learned by blowing up the maps until the words count for nothing.
MASK_DECODER = "sam2.sam_mask_decoder"
MASK_WEIGHTS = f"{MASK_DECODER}.output_hypernetworks_mlps.layers.2"
MASK_SCALE = 0.4
BACKGROUND_LOGIT = -2.0
# Layer scales start at 1 and not at InternViT's 0.1, which is meant for many layers.
LAYER_SCALES = ("*.ls1", "*.ls2")
SAM2_SIZE = "sam2.image_size"


def resolve_model(config: TrainConfig) -> TrainConfig:
    """The configuration with the sizes of the checkpoint it starts from, and its own precision.

    No parameter depends on the size of SAM2's image: that may be another than the checkpoint's.

    Raises:
        InputError: there is no checkpoint or it cannot be read, or the configuration asks for another model
            than it holds, for sizes that do not fit each other, or for a precision of the model alone.
    """
    model = config.model
    for field, asked in to_dict(model.precision).items():
        if asked not in (getattr(Precision(), field), getattr(config.precision, field)):
            raise InputError(
                f"--model.precision.{field}={asked} would have no effect; set --precision.{field} instead."
            )
    if config.initial:
        if not checkpoint.is_checkpoint(config.initial):
            raise InputError(
                f"{config.initial} is no converted checkpoint; convert a release with `python -m "
                "convert.from_torch`, or give RUN/model of a finished run."
            )
        model = checkpoint.read_config(config.initial)
        usual, has = (checkpoint.flatten(to_dict(known)) for known in (ModelConfig(), model))
        for field, asked in checkpoint.flatten(to_dict(config.model)).items():
            if field != SAM2_SIZE and asked not in (usual[field], has[field]):
                raise InputError(
                    f"The configuration asks for model.{field} = {asked!r} but {config.initial} has "
                    f"{has[field]!r}; leave `model` out, since a checkpoint brings its own sizes."
                )
        if config.model.sam2.image_size != ModelConfig().sam2.image_size:
            sam2 = dataclasses.replace(model.sam2, image_size=config.model.sam2.image_size)
            model = dataclasses.replace(model, sam2=sam2)
    require_fitting(model)
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
    """All parameters, drawn from the seed, with spreads that suit any width; layer scales start at 1.

    They are slices of one long draw: a program with a draw for each takes minutes to compile.
    """
    _, shapes = structure(config)
    spreads = {path: spread(path, value.shape) for path, value in shapes.items()}
    drawn = [path for path, value in spreads.items() if value is not None]

    def draw() -> Parameters:
        _, parameters = split(build_model(config))
        ends = np.cumsum([math.prod(shapes[path].shape) for path in drawn])
        numbers = jax.random.normal(jax.random.key(config.seed), (ends[-1],))
        for path, part in zip(drawn, jnp.split(numbers, ends[:-1]), strict=True):
            parameters[path] = part.reshape(shapes[path].shape) * spreads[path]
        for path, leaf in shapes.items():
            if matches(path, LAYER_SCALES):
                parameters[path] = jnp.ones(leaf.shape)
        # All channels of the upscaled map start near 1, and every mask takes the same little from each.
        parameters[f"{MASK_DECODER}.upscale_conv2.bias"] += 1
        bias = parameters[f"{MASK_WEIGHTS}.bias"]
        parameters[f"{MASK_WEIGHTS}.bias"] = bias + BACKGROUND_LOGIT / bias.shape[-1]
        for head, says in UNTAUGHT_HEADS.items():
            parameters[f"{head}.kernel"] = jnp.zeros(shapes[f"{head}.kernel"].shape)
            parameters[f"{head}.bias"] = jnp.full(shapes[f"{head}.bias"].shape, says)
        return parameters

    return jax.jit(draw)()


def spread(path: str, shape: tuple[int, ...]) -> float | None:
    """Standard deviation of a parameter at the start, or None for what is not drawn."""
    if path.endswith(".kernel"):
        scale = NECK_SCALE if matches(path, (NECK,)) else MASK_SCALE if path.startswith(MASK_WEIGHTS) else 1
        return scale * fan_in(path, shape) ** -0.5
    if path == "language_model.embed_tokens":
        return shape[-1] ** -0.5  # as a kernel of the output head, which it may be
    return POSITION_SPREAD if matches(path, POSITIONS) else None


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
