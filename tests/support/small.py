"""A model that compiles in seconds, and batches for it: what the training tests share."""

import numpy as np

from unibiomed_jax.config.model import HieraConfig, LanguageConfig, ModelConfig, Sam2Config, VisionConfig
from unibiomed_jax.parameters import partition
from unibiomed_jax.training.config import (
    FreezeConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    RematConfig,
    TrainConfig,
)
from unibiomed_jax.training.forward import TokenIds
from unibiomed_jax.training.initialise import random_parameters, structure
from unibiomed_jax.training.step import init_state

MODEL = ModelConfig(
    vision=VisionConfig(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, image_size=28),
    language=LanguageConfig(
        vocab_size=30,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=32,
        vocab_multiple=16,
    ),
    sam2=Sam2Config(
        image_size=64,
        hiera=HieraConfig(embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), global_attention_blocks=()),
        d_model=16,
        decoder_heads=2,
        decoder_mlp_dim=32,
        memory_dim=8,
        memory_layers=1,
        memory_mlp_dim=16,
    ),
)
IDS = TokenIds(image=28, seg=29)
STEP = TrainConfig(
    model=MODEL,
    loss=LossConfig(num_points=64, token_chunk=8),
    lora=LoraConfig(rank=2, alpha=4.0, dropout=0.1),
    # Of every part of the default something, and little: each tensor that trains takes its time to compile.
    freeze=FreezeConfig(
        trainable=(
            "*.lora.*",
            "language_model.embed_tokens",
            "mlp1.*",
            "text_hidden_fcs.*",
            "sam2.sam_mask_decoder.mask_tokens",
            "sam2.sam_mask_decoder.upscale*",
        ),
        frozen=(),
    ),
    optim=OptimConfig(lr=1e-2, steps=20, accumulate=1),
    remat=RematConfig(language="none"),
)


def random_batch(seed, size=4, tiles=2, tokens=12, objects=2, frames=1):
    """Samples with one or two tiles and up to `objects` objects; the second sample has none."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 27, (size, tokens))
    num_objects = rng.integers(1, objects + 1, size)
    if size > 1:
        num_objects[1] = 0
    for row in range(size):
        ids[row, 1 : 1 + rng.integers(1, tiles + 1)] = IDS.image
        ids[row, 8 : 8 + num_objects[row]] = IDS.seg
    learned = np.arange(tokens) >= 6 + rng.integers(0, 3, (size, 1))
    return {
        "pixel_values": rng.normal(size=(size, tiles, 28, 28, 3)).astype(np.float32),
        "input_ids": ids.astype(np.int32),
        "labels": np.where(learned, ids, -100).astype(np.int32),
        "sam_pixels": rng.integers(0, 256, (size, frames, 64, 64, 3)).astype(np.uint8),
        "masks": rng.integers(0, 2, (size, objects, frames, 16, 16)).astype(np.uint8),
        "object_valid": np.arange(objects) < num_objects[:, None],
        "frame_valid": np.ones((size, frames), bool),
    }


def build(config=STEP):
    """(structure, state, frozen parameters) of the small model."""
    graphdef, _ = structure(config)
    trainable, frozen = partition(random_parameters(config), config.freeze.trainable, config.freeze.frozen)
    return graphdef, init_state(trainable, config), frozen
