"""What every axis of a parameter means, and in what units it may be divided."""

from __future__ import annotations

from fnmatch import fnmatchcase

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import InputError

# Path pattern -> meaning of the trailing axes; the first row that fits counts. A stack of layers has one more
# axis in front, "layer". None: an axis that is never split.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # InternViT and the projector
    ("vision_model.patch_embedding.kernel", (None, None, None, "vision")),
    ("vision_model.position_embedding", (None, "vision")),
    ("vision_model.*.attn.qkv.kernel", ("vision", "vision_qkv")),
    ("vision_model.*.attn.qkv.bias", ("vision_qkv",)),
    ("vision_model.*.attn.proj.kernel", ("vision_heads", "vision")),
    ("vision_model.*.mlp.fc1.kernel", ("vision", "vision_mlp")),
    ("vision_model.*.mlp.fc1.bias", ("vision_mlp",)),
    ("vision_model.*.mlp.fc2.kernel", ("vision_mlp", "vision")),
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
    ("sam2.image_encoder.trunk.patch_embed.kernel", (None, None, None, "trunk")),
    ("sam2.image_encoder.trunk.pos_embed*", (None, None, "trunk")),
    ("sam2.image_encoder.trunk.*.attn.qkv.kernel", ("trunk", "trunk_qkv")),
    ("sam2.image_encoder.trunk.*.attn.qkv.bias", ("trunk_qkv",)),
    ("sam2.image_encoder.trunk.*.attn.proj.kernel", ("trunk_heads", "trunk")),
    ("sam2.image_encoder.trunk.*.mlp.fc1.kernel", ("trunk", "trunk_mlp")),
    ("sam2.image_encoder.trunk.*.mlp.fc1.bias", ("trunk_mlp",)),
    ("sam2.image_encoder.trunk.*.mlp.fc2.kernel", ("trunk_mlp", "trunk")),
    ("sam2.image_encoder.trunk.*.proj.kernel", ("trunk", None)),
    ("sam2.image_encoder.trunk.*", (None,)),
    ("sam2.image_encoder.neck.*.kernel", (None, None, "trunk", None)),
    # the rest of SAM2 is small: its kernels are split by their input, if at all
    ("sam2.*.dwconv.kernel", (None, None, None, "mask")),
    ("sam2.*.pwconv?.kernel", ("mask", None)),
    ("sam2.sam_mask_decoder.upscale_conv?.kernel", ("mask", None, None, None)),
    ("sam2.*conv*.kernel", (None, None, "mask", None)),
    ("sam2.memory_encoder.pix_feat_proj.kernel", (None, None, "mask", None)),
    ("sam2.memory_encoder.out_proj.kernel", (None, None, "mask", None)),
    ("sam2.mask_downsample.kernel", (None, None, None, None)),
    ("sam2.*.kernel", ("mask", None)),
    ("sam2.sam_prompt_encoder.p*", (None, None)),
    ("sam2.*_token", (None, None)),
    ("sam2.*.mask_tokens", (None, None)),
    ("sam2.maskmem_tpos_enc", (None, None)),
    ("sam2.*", (None,)),
)

# What a strategy may divide: the axes above, the samples of a batch and the rank of an adapter.
MEANINGS = {"batch", "rank", *(meaning for _, axes in LOGICAL_AXES for meaning in axes if meaning)}

# Axes that hold several arrays side by side; a slice would mix them, so they are never divided.
FUSED = dict.fromkeys(("vision_qkv", "trunk_qkv"), "queries, keys and values")


def axis_units(model: ModelConfig) -> dict[str, int]:
    """How many numbers along an axis belong together, by its meaning: a head is never cut apart."""
    hiera = model.sam2.hiera
    return {
        "heads": model.language.head_dim,
        "kv_heads": model.language.head_dim,
        "vision_heads": model.vision.hidden_size // model.vision.num_heads,
        # Width and heads double together from stage to stage.
        "trunk_heads": hiera.embed_dim // hiera.num_heads,
    }


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
