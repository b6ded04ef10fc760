"""Which number format each part computes in."""

from __future__ import annotations

import typing
from dataclasses import dataclass

import jax

Dtype = typing.Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Compute dtype per part: "float32" is exact, "bfloat16" is what the reference runs on a GPU.

    Norms, softmax, rotary angles and everything after the selected mask stay in float32 under any policy.
    """

    # InternViT and the projector.
    vision: Dtype = "float32"
    # The language model.
    language: Dtype = "float32"
    # SAM2's image encoder. "mixed": float32 activations, bfloat16 products but for the first stage and the
    # pyramid, which decide where a border runs.
    sam2_encoder: typing.Literal["float32", "bfloat16", "mixed"] = "float32"
    # SAM2's mask decoder and memory.
    sam2_decoder: Dtype = "float32"
    # Evaluate the dense positional encoding in bfloat16, the rounding the released weights were trained with.
    bfloat16_position: bool = False


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
