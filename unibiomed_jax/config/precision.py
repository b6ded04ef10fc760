"""Which number format each part computes in."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
# Masks of the recorded cases stay within IoU 0.999 of float32's; at full size, with random weights, 0.9952
# was seen (benchmarks/precision.py).
CPU = Precision("bfloat16", "float32", "mixed", "float32")


def default_precision() -> Precision:
    """The policy of this backend: bfloat16 as the reference; of a CPU FLOAT32, or CPU if it has the units."""
    if jax.default_backend() != "cpu":
        return BFLOAT16
    return CPU if has_bfloat16_units() else FLOAT32


def has_bfloat16_units(
    cpuinfo: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ
) -> bool:
    """Whether the processor multiplies bfloat16, and XLA may use that; False where nobody says.

    Elsewhere products of bfloat16 are those of float32 with conversions around: slower and coarser.

    Args:
        cpuinfo: where Linux says what the processor can do (x86: flags, Arm: Features).
        environment: where XLA_FLAGS may limit the instructions that XLA uses.
    """
    allowed = re.search(r"--xla_cpu_max_isa=(\w+)", environment.get("XLA_FLAGS", ""))
    if allowed and allowed[1].upper() not in ("AVX512_BF16", "AMX", "AMX_FP16"):
        return False
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found[1].split())
