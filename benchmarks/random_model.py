"""A model with random weights, and questions to it: speed does not depend on the weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from numpy.typing import DTypeLike
from PIL import Image
from qwen2_tokenizer import qwen2_tokenizer

from unibiomed_jax import Request, UniBiomed
from unibiomed_jax.config.model import LanguageConfig, ModelConfig, VisionConfig
from unibiomed_jax.config.precision import FLOAT32, Precision, PrecisionName, find_precision
from unibiomed_jax.config.presets import SAM2_VARIANTS
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.models.unibiomed import UniBiomedModel

# "full" is UniBiomed-1B; "micro" only shows that a benchmark works.
SIZES = {
    "full": ModelConfig(),
    "micro": ModelConfig(
        vision=VisionConfig(hidden_size=64, num_layers=2, num_heads=4, mlp_dim=128, image_size=112),
        language=LanguageConfig(hidden_size=64, num_layers=2, num_heads=4, mlp_dim=128),
        sam2=SAM2_VARIANTS["micro"],
    ),
}
# The release stores these parts in bfloat16 and SAM2 in float32.
STORED_BFLOAT16 = ("vision_model", "mlp1", "language_model")
# 25 tokens around the image's.
PROMPT = "<image>Please segment the liver in this abdomen CT."


@functools.cache
def noise() -> np.ndarray:
    """Normal numbers that repeat; a prime length, so that the rows of a matrix differ."""
    return np.random.default_rng(0).standard_normal(1_000_003, np.float32)


def random_array(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A parameter of sane scale, made at the speed of memory; `name` is the last of its path."""
    if name == "scale":
        return np.ones(shape, dtype)
    std = 0.02
    if name == "kernel":
        std = np.prod(shape[-2:-1] if len(shape) <= 3 else shape[-4:-1]) ** -0.5
    return np.resize((noise() * np.float32(std)).astype(dtype), shape)


def random_parameters(config: ModelConfig) -> dict:
    """The whole parameter tree."""
    model = nnx.eval_shape(lambda: UniBiomedModel(config, FLOAT32, rngs=nnx.Rngs(0)))

    def fill(path, leaf):
        part, name = path[0].key, path[-1].key
        half = part in STORED_BFLOAT16 and name != "scale"
        return random_array(name, leaf.shape, ml_dtypes.bfloat16 if half else np.float32)

    return jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(nnx.state(model)))


def random_model(size: str, precision: PrecisionName, tokenizer: Path | None = None) -> UniBiomed:
    """The predictor at one of SIZES."""
    config = SIZES[size]
    loaded = qwen2_tokenizer() if tokenizer is None else Tokenizer.from_folder(tokenizer)
    return UniBiomed(config, random_parameters(config), loaded, precision=find_precision(precision))


def seg_steps(segments: int, new_tokens: int) -> list[int]:
    """The steps at which `[SEG]` is said, spread over the answer and never last."""
    return [(i + 1) * new_tokens // (segments + 1) for i in range(segments)]


def question(
    model: UniBiomed, segments: int, new_tokens: int, size: tuple[int, int] = (410, 410), seed: int = 0
) -> Request:
    """Ask about a random image of `size` = (width, height); every token of the answer is set beforehand.

    The model computes its own choice all the same. So no answer ends early, and `[SEG]` is said where wanted.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    word = model.tokenizer.encode(" liver")[0]
    forced = dict.fromkeys(range(new_tokens), word)
    forced |= dict.fromkeys(seg_steps(segments, new_tokens), model.tokenizer.seg_id)
    return Request(PROMPT, Image.fromarray(pixels), forced=forced)


def describe(precision: Precision) -> str:
    """Precision policy in words."""
    parts = dataclasses.asdict(precision)
    return ", ".join(f"{name} {value}" for name, value in parts.items() if isinstance(value, str))
