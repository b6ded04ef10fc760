"""Which dtype each part computes in, and parameters stored to match."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unibiomed_jax.config import ModelConfig, Precision

FLOAT32 = Precision()
# Everywhere, as the reference runs on a GPU.
BFLOAT16 = Precision("bfloat16", "bfloat16", "bfloat16", "bfloat16", bfloat16_position=True)
# On a CPU with bfloat16 units large products gain from them: a call took 9.8 s instead of 17.9 s (jax 0.10,
# benchmarks/predict.py). A decoding step does not gain: it is bound by reading the weights.
# Masks stay within IoU 0.999 of float32's.
CPU = Precision("bfloat16", "float32", "mixed", "float32")


def default_precision() -> Precision:
    """The fastest policy of this backend that keeps the answers of the reference."""
    return CPU if jax.default_backend() == "cpu" else BFLOAT16


def cast_parameters(params: dict, config: ModelConfig, precision: Precision) -> dict:
    """Store every matrix in the dtype it is multiplied in; vectors stay in float32, where they are used."""

    def cast(path, leaf):
        names = tuple(key.key for key in path)
        matrix = names[-1] in ("kernel", "embed_tokens")
        return jnp.asarray(leaf, _kernel_dtype(names, config, precision) if matrix else jnp.float32)

    return jax.tree_util.tree_map_with_path(cast, params)


def _kernel_dtype(names: tuple, config: ModelConfig, precision: Precision) -> str:
    match names:
        case ("vision_model" | "mlp1", *_):
            return precision.vision
        case ("language_model", *_):
            return precision.language
        case ("sam2", "image_encoder", "trunk", "runs", run, *_) if precision.sam2_encoder == "mixed":
            fine = config.sam2.hiera.runs()[run].dim_out == config.sam2.hiera.embed_dim
            return "float32" if fine else "bfloat16"
        case ("sam2", "image_encoder", *_) | ("sam2", "sam_mask_decoder", "conv_s0" | "conv_s1", *_):
            return "float32" if precision.sam2_encoder == "mixed" else precision.sam2_encoder
        case ("sam2", *_):
            return precision.sam2_decoder
    return "float32"
