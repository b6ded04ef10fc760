"""What every axis of a parameter and of an activation means, and in what units it may be divided."""

from __future__ import annotations

from fnmatch import fnmatchcase

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import InputError

# First names of a parameter's path -> the tower it belongs to. A strategy that says "vision.mlp" speaks of
# that tower alone, one that says "mlp" of all that it says nothing else about.
TOWERS = {
    "vision_model": "vision",
    "mlp1": "vision",
    "language_model": "language",
    "text_hidden_fcs": "language",
    "sam2": "sam2",
}

# Path pattern -> meaning of the trailing axes; the first row that fits counts. A stack of layers has one more
# axis in front, "layer". None: an axis that no computation divides.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # InternViT and the projector
    ("vision_model.patch_embedding.kernel", (None, None, None, "embed")),
    ("vision_model.position_embedding", (None, "embed")),
    ("vision_model.*.attn.qkv.kernel", ("embed", "qkv")),
    ("vision_model.*.attn.qkv.bias", ("qkv",)),
    ("vision_model.*.attn.proj.kernel", ("heads", "embed")),
    ("vision_model.*.mlp.fc1.kernel", ("embed", "mlp")),
    ("vision_model.*.mlp.fc1.bias", ("mlp",)),
    ("vision_model.*.mlp.fc2.kernel", ("mlp", "embed")),
    ("vision_model.*", (None,)),
    ("mlp1.norm.*", (None,)),
    ("mlp1.linear1.kernel", ("folded", "embed")),
    ("mlp1.linear2.kernel", ("embed", None)),
    ("mlp1.*.bias", (None,)),
    # the language model
    ("language_model.embed_tokens", ("vocab", "embed")),
    ("language_model.lm_head.kernel", ("embed", "vocab")),
    ("language_model.*.q_proj.kernel", ("embed", "heads")),
    ("language_model.*.q_proj.bias", ("heads",)),
    ("language_model.*.[kv]_proj.kernel", ("embed", "kv_heads")),
    ("language_model.*.[kv]_proj.bias", ("kv_heads",)),
    ("language_model.*.o_proj.kernel", ("heads", "embed")),
    ("language_model.*.gate_proj.kernel", ("embed", "mlp")),
    ("language_model.*.up_proj.kernel", ("embed", "mlp")),
    ("language_model.*.down_proj.kernel", ("mlp", "embed")),
    ("language_model.*norm.scale", (None,)),
    ("text_hidden_fcs.linear1.kernel", ("embed", None)),
    ("text_hidden_fcs.linear2.kernel", ("embed", None)),
    ("text_hidden_fcs.*.bias", (None,)),
    # SAM2's trunk
    ("sam2.image_encoder.trunk.patch_embed.kernel", (None, None, None, "embed")),
    ("sam2.image_encoder.trunk.pos_embed*", (None, None, "embed")),
    ("sam2.image_encoder.trunk.*.attn.qkv.kernel", ("embed", "qkv")),
    ("sam2.image_encoder.trunk.*.attn.qkv.bias", ("qkv",)),
    ("sam2.image_encoder.trunk.*.attn.proj.kernel", ("heads", "embed")),
    ("sam2.image_encoder.trunk.*.mlp.fc1.kernel", ("embed", "mlp")),
    ("sam2.image_encoder.trunk.*.mlp.fc1.bias", ("mlp",)),
    ("sam2.image_encoder.trunk.*.mlp.fc2.kernel", ("mlp", "embed")),
    ("sam2.image_encoder.trunk.*.proj.kernel", ("embed", None)),
    ("sam2.image_encoder.trunk.*", (None,)),
    ("sam2.image_encoder.neck.*.kernel", (None, None, "embed", None)),
    # the rest of SAM2 is small: its kernels are split by their input, if at all
    ("sam2.*.dwconv.kernel", (None, None, None, "embed")),
    ("sam2.*.pwconv?.kernel", ("embed", None)),
    ("sam2.sam_mask_decoder.upscale_conv?.kernel", ("embed", None, None, None)),
    ("sam2.*conv*.kernel", (None, None, "embed", None)),
    ("sam2.memory_encoder.pix_feat_proj.kernel", (None, None, "embed", None)),
    ("sam2.memory_encoder.out_proj.kernel", (None, None, "embed", None)),
    ("sam2.mask_downsample.kernel", (None, None, None, None)),
    ("sam2.*.kernel", ("embed", None)),
    ("sam2.sam_prompt_encoder.p*", (None, None)),
    ("sam2.*_token", (None, None)),
    ("sam2.*.mask_tokens", (None, None)),
    ("sam2.maskmem_tpos_enc", (None, None)),
    ("sam2.*", (None,)),
)

# Axes of activations, besides those that parameters have, too. The leading ones hold samples one after the
# other, cut into tiles, images (frames of all samples) or the windows of all images.
SAMPLES = ("batch", "tiles", "images", "windows")
ACTIVATIONS = (*SAMPLES, "tokens")

# What is divided for storage alone, along whichever axis of a matrix divides: it is whole again (but for what
# a computation divides) where it is used.
WEIGHTS = "weights"  # parameters
OPTIMIZER = (
    "optimizer"  # what an optimiser keeps of them, masters included; as the weights if nothing is said
)
STORED = (WEIGHTS, OPTIMIZER)

# Axes that a computation may divide.
COMPUTED = ("heads", "kv_heads", "mlp", "vocab")

# What a strategy may divide; a tower's name and a dot may stand in front.
MEANINGS = (*ACTIVATIONS, *STORED, *COMPUTED)


def axis_units(model: ModelConfig) -> dict[str, int]:
    """How many numbers along an axis belong together, by tower and meaning: a head is never cut apart."""
    hiera = model.sam2.hiera
    return {
        "language.heads": model.language.head_dim,
        "language.kv_heads": model.language.head_dim,
        "vision.heads": model.vision.hidden_size // model.vision.num_heads,
        # Width and heads double together from stage to stage.
        "sam2.heads": hiera.embed_dim // hiera.num_heads,
    }


def tower_of(path: str) -> str:
    """The tower of the parameter at a dotted path."""
    return TOWERS[path.partition(".")[0]]


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """The meaning of every axis of the parameter at a dotted path.

    Raises:
        InputError: the table has no row for it, or a row of another number of axes.
    """
    layer, _, part = path.partition(".lora.")
    if part:  # an adapter splits the kernel's (in, out) into (in, rank) and (rank, out)
        *stack, axis_in, axis_out = logical_axes(f"{layer}.kernel", ndim)
        return (*stack, axis_in, "rank") if part == "a" else (*stack, "rank", axis_out)
    axes = next((axes for pattern, axes in LOGICAL_AXES if fnmatchcase(path, pattern)), None)
    if axes is None or ndim - len(axes) not in (0, 1):
        raise InputError(f"The parameter {path!r} with {ndim} axes has no row in LOGICAL_AXES: add one.")
    return ("layer", *axes) if ndim > len(axes) else axes
