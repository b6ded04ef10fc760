"""Random parameters of a whole model, with spreads that suit any width."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import Parameters, matches, split
from unibiomed_jax.sharding.axes import logical_axes
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import TrainConfig

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


def build_model(config: TrainConfig) -> UniBiomedModel:
    """A model with random parameters and its adapters."""
    model = UniBiomedModel(config.model, config.precision, rngs=nnx.Rngs(config.seed))
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
    *inputs, _ = shape[logical_axes(path, len(shape))[0] == "layer" :]
    return inputs[0] if "upscale" in path else math.prod(inputs)  # an upscaled cell sees one cell
