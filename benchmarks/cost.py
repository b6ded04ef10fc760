"""How much arithmetic each stage needs: FLOPs by number format, from the sizes in the configuration.

A multiply-add counts as 2 FLOPs. Matrix products, convolutions and attention only; of causal attention the
half that is needed. Norms, activations and the softmax are left out: a share of the ceiling charges for them.
"""

from __future__ import annotations

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import Precision

# FLOPs by the format the products are computed in: "float32" or "bfloat16".
Work = dict[str, float]


def encode_tile(config: ModelConfig, precision: Precision) -> Work:
    """InternViT and the projector for one tile."""
    vision, width, language = config.vision, config.vision.hidden_size, config.language.hidden_size
    tokens = vision.grid**2 + 1
    patches = 2 * vision.grid**2 * 3 * vision.patch_size**2 * width
    block = 2 * tokens * width * (4 * width + 2 * vision.mlp_dim) + 4 * tokens**2 * width
    folded = width * round(1 / config.downsample_ratio) ** 2
    projector = 2 * config.tokens_per_tile * (folded * language + language**2)
    return {precision.vision: patches + vision.num_layers * block + projector}


def prefill(config: ModelConfig, precision: Precision, tokens: int, parts: int = 0) -> Work:
    """The language model over a prompt, with scores of the vocabulary after its last token only.

    With `parts`, its layers multiply float32 inputs as a sum of so many bfloat16 numbers (inference/cpu.py).
    """
    language, width = config.language, config.language.hidden_size
    projections = 2 * width * (width + language.num_kv_heads * language.head_dim)
    linear = 2 * tokens * (projections + 3 * width * language.mlp_dim)
    attention = 4 * (tokens**2 / 2) * width
    head = 2 * width * language.vocab_size
    linear, attention = language.num_layers * linear + head, language.num_layers * attention
    if parts:
        return {"bfloat16": parts * linear, "float32": attention}
    return {precision.language: linear + attention}


def encode_image(config: ModelConfig, precision: Precision) -> Work:
    """SAM2's image encoder for one image: Hiera, the pyramid, and the decoder's two convolutions of it."""
    sam2, hiera, mixed = config.sam2, config.sam2.hiera, precision.sam2_encoder == "mixed"
    grids = [4 * sam2.grid // 2**stage for stage in range(4)]
    fine = 2 * grids[0] ** 2 * 3 * 7 * 7 * hiera.embed_dim
    coarse = 0.0
    for run in hiera.runs():
        side = grids[hiera.stage_dims.index(run.dim_out)] * (2 if run.pools else 1)
        cells, queries = side**2, side**2 // (4 if run.pools else 1)
        linear = 2 * cells * run.dim_in * 3 * run.dim_out + 2 * queries * 9 * run.dim_out**2
        if run.dim_in != run.dim_out:
            linear += 2 * cells * run.dim_in * run.dim_out
        fine += run.count * 4 * queries * (run.window or side) ** 2 * run.dim_out
        if mixed and run.dim_out >= hiera.stage_dims[2]:
            coarse += run.count * linear
        else:
            fine += run.count * linear
    for grid, dim in zip(grids, hiera.stage_dims, strict=True):
        fine += 2 * grid**2 * dim * sam2.d_model
    fine += 2 * sam2.d_model**2 * (grids[0] ** 2 / 8 + grids[1] ** 2 / 4)
    if mixed:
        return {"float32": fine, "bfloat16": coarse}
    return {precision.sam2_encoder: fine}


def decode_masks(config: ModelConfig, precision: Precision, objects: int) -> Work:
    """SAM2's mask decoder for the `[SEG]` of one image: two two-way blocks, a last look, the upscaling."""
    sam2, dim, tokens = config.sam2, config.sam2.d_model, 9
    cells, inner = sam2.grid**2, sam2.d_model // 2
    look = 4 * tokens * cells * inner
    block = 2 * 4 * cells * dim * inner + 2 * look + 4 * tokens * dim * sam2.decoder_mlp_dim
    block += 8 * tokens * dim * dim + 16 * tokens * dim * inner
    last = 2 * 2 * cells * dim * inner + look + 4 * tokens * dim * inner
    upscale = 2 * cells * dim * dim + 2 * 4 * cells * (dim // 4) * (dim // 2)
    masks = 2 * 4 * 16 * cells * (dim // 8)
    return {precision.sam2_decoder: objects * (2 * block + last + upscale + masks)}


def cache_bytes(config: ModelConfig, precision: Precision, tokens: int) -> int:
    """Size of the keys and values of so many tokens."""
    language = config.language
    size = 2 if precision.language == "bfloat16" else 4
    return 2 * language.num_layers * language.num_kv_heads * language.head_dim * tokens * size
