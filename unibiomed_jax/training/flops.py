"""How much arithmetic a batch needs, and what share of a device's peak a step reaches.

A multiplication and an addition are two operations. Only matrix products, convolutions and attention count,
and only what the valid tiles, tokens, frames and objects need: padding and what is computed again in the
backward pass do not. Causal attention counts half. So the share of the peak cannot be raised by wasting work.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import jax
import numpy as np

from unibiomed_jax.config.model import HieraConfig, LanguageConfig, ModelConfig, Sam2Config, VisionConfig
from unibiomed_jax.training.losses import IGNORE

# Dense bfloat16 peak, operations a second, by a part of the device's name. From the vendors' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    # Half a chip: JAX sees two devices on it.
    "TPU7x": 1153.5e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak of a device, or None if the table does not know it (CPUs differ too much to be listed)."""
    return next((peak for name, peak in PEAKS.items() if name in device.device_kind), None)


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass by part."""

    # InternViT, and the projector behind it.
    vision: float
    projector: float
    # Linear layers of the decoder, its attention, its output head, and the adapters.
    decoder: float
    decoder_attention: float
    head: float
    adapters: float
    # SAM2's image encoder and mask decoder.
    sam2_encoder: float
    mask_decoder: float


def forward_work(config: ModelConfig, batch: dict[str, np.ndarray], lora_rank: int = 0) -> Work:
    """What the valid part of a batch (see training/forward.py) asks for."""
    tiles = int(batch["tile_valid"].sum())
    lengths = batch["token_valid"].sum(1)
    tokens, squares = int(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
    learned = int((batch["labels"] != IGNORE).sum())
    frames = int(batch["frame_valid"].sum())
    masks = int((batch["object_valid"].sum(1) * batch["frame_valid"].sum(1)).sum())
    language = config.language
    folded = config.vision.hidden_size * round(1 / config.downsample_ratio) ** 2
    width = language.hidden_size
    return Work(
        vision=tiles * vision_tile(config.vision),
        projector=tiles * config.tokens_per_tile * 2 * (folded * width + width**2),
        decoder=tokens * 2 * decoder_weights(language),
        decoder_attention=2 * squares * language.num_layers * language.num_heads * language.head_dim,
        head=learned * 2 * width * language.vocab_size,
        adapters=tokens * 2 * adapter_weights(language, lora_rank),
        sam2_encoder=frames * (hiera_image(config.sam2) + neck_image(config.sam2)),
        mask_decoder=masks * mask_decoder(config.sam2),
    )


def step_flops(work: Work, trainable: Collection[str]) -> float:
    """Operations of forward and backward, given the paths of what trains.

    A weight that trains costs its forward product again for its own gradient; a part in or below which
    something trains costs it again for the gradient that passes to its input. SAM2's memory is not counted:
    where objects are followed (loss.follow), more is computed than this says.
    """
    weights = [path for path in trainable if ".lora." not in path]

    def train(paths: Collection[str], *parts: str) -> bool:
        return any(path.startswith(parts) for path in paths)

    # Whether a gradient passes, from the bottom up. Everything but the output head lies below the masks.
    vision = train(trainable, "vision_model")
    projector = vision or train(trainable, "mlp1")
    decoder = projector or train(trainable, "language_model.layers", "language_model.embed_tokens")
    head = decoder or train(trainable, "language_model.norm")
    sam2_encoder = train(trainable, "sam2.image_encoder")
    masks = any(not path.startswith("language_model.lm_head") for path in trainable)
    return (
        work.vision * (1 + vision + train(weights, "vision_model"))
        + work.projector * (1 + projector + train(weights, "mlp1"))
        + work.decoder * (1 + decoder + train(weights, "language_model.layers"))
        + work.decoder_attention * (1 + 2 * decoder)  # both of its factors are activations
        + work.adapters * (1 + decoder + any(".lora." in path for path in trainable))
        + work.head * (1 + head + train(weights, "language_model.lm_head", "language_model.embed_tokens"))
        + work.sam2_encoder * (1 + sam2_encoder + train(weights, "sam2.image_encoder"))
        + work.mask_decoder * (1 + masks + train(weights, "sam2.sam_mask_decoder"))
    )


def vision_tile(config: VisionConfig) -> float:
    """InternViT on one tile."""
    patches, width = config.grid**2, config.hidden_size
    tokens = patches + 1
    block = tokens * 2 * (4 * width**2 + 2 * width * config.mlp_dim) + 4 * tokens**2 * width
    return patches * 2 * config.patch_size**2 * 3 * width + config.num_layers * block


def decoder_weights(config: LanguageConfig) -> int:
    """Numbers in the linear layers of the decoder's blocks."""
    return config.num_layers * sum(i * o for i, o in decoder_shapes(config))


def adapter_weights(config: LanguageConfig, rank: int) -> int:
    """Numbers in adapters on all of these layers."""
    return config.num_layers * rank * sum(i + o for i, o in decoder_shapes(config))


def decoder_shapes(config: LanguageConfig) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of a block."""
    width, queries = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    mlp = config.mlp_dim
    return [(width, queries), (width, keys), (width, keys), (queries, width)] + [
        (width, mlp),
        (width, mlp),
        (mlp, width),
    ]


def hiera_image(config: Sam2Config) -> float:
    """SAM2's trunk on one image."""
    hiera: HieraConfig = config.hiera
    grid = config.image_size // 4
    total = grid**2 * 2 * 7 * 7 * 3 * hiera.embed_dim
    for run in hiera.runs():
        cells = grid**2
        grid = grid // 2 if run.pools else grid
        cells_out = grid**2
        keys = min(run.window, grid * (2 if run.pools else 1)) ** 2 if run.window else cells
        dim = run.dim_out
        block = cells * 2 * run.dim_in * 3 * dim + cells_out * 2 * dim * (dim + 8 * dim)
        block += 4 * cells_out * keys * dim
        if run.dim_in != dim:
            block += cells * 2 * run.dim_in * dim
        total += run.count * block
    return total


def neck_image(config: Sam2Config) -> float:
    """The feature pyramid, and the two projections of its fine levels."""
    dim, finest = config.d_model, (config.image_size // 4) ** 2
    levels = sum(finest // 4**level * 2 * width * dim for level, width in enumerate(config.hiera.stage_dims))
    return levels + finest * 2 * dim * (dim // 8) + finest // 4 * 2 * dim * (dim // 4)


def mask_decoder(config: Sam2Config, tokens: int = 9) -> float:
    """The mask decoder for one object in one image."""
    dim, mlp, cells = config.d_model, config.decoder_mlp_dim, config.grid**2
    inner = dim // 2

    def cross(queries: int, keys: int) -> float:
        """Attention of half the width between tokens and image, projections included."""
        return 2 * dim * inner * 2 * (queries + keys) + 4 * queries * keys * inner

    layer = tokens * 2 * 4 * dim**2 + 4 * tokens**2 * dim + tokens * 2 * 2 * dim * mlp
    layer += cross(tokens, cells) + cross(cells, tokens)
    upscale = cells * 2 * dim * dim + 4 * cells * 2 * (dim // 4) * (dim // 2)
    read = 4 * 2 * (2 * dim**2 + dim * dim // 8) + 16 * cells * 2 * 3 * (dim // 8)
    return 2 * layer + cross(tokens, cells) + upscale + read
