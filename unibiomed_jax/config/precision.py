"""Which number format each part computes in."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
# On a CPU that multiplies bfloat16, large products gain from it; a decoding step does not: it is bound by
# reading the weights. Coarser: at full size, with random weights, masks of IoU 0.995 against float32's were
# seen (benchmarks/precision.py), and InternViT or SAM2's encoder alone do not keep 0.999 either.
FAST = Precision("bfloat16", "float32", "mixed", "float32")

PrecisionName = typing.Literal["auto", "float32", "fast", "bfloat16"]


def find_precision(name: PrecisionName, platform: str | None = None) -> Precision:
    """The policy of a name.

    "auto" is bfloat16 on a GPU or TPU, as the reference, and float32 on a CPU. "fast" is the fastest of this
    backend: on a CPU without bfloat16 arithmetic that is float32 as well.

    Args:
        name: of the policy.
        platform: that computes ("cpu", "gpu", "tpu"); by default that of this process.
    """
    import jax  # a command line that names a policy does not need it yet

    if name == "float32":
        return FLOAT32
    if name == "bfloat16" or (platform or jax.default_backend()) != "cpu":
        return BFLOAT16
    return FAST if name == "fast" and bfloat16_units() else FLOAT32


def bfloat16_units(
    cpuinfo: Path = Path("/proc/cpuinfo"), environment: Mapping[str, str] = os.environ
) -> typing.Literal["matrix", "vector"] | None:
    """With what the processor multiplies bfloat16, as far as XLA may use it; None where nobody says.

    "matrix" units (AMX) do it five times as fast as float32, "vector" units (AVX-512) twice. Elsewhere
    products of bfloat16 are those of float32 with conversions around: slower and coarser.

    Args:
        cpuinfo: where Linux says what the processor can do.
        environment: where XLA_FLAGS may limit the instructions that XLA uses.
    """
    try:
        found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    features = set(found[1].split()) if found else set()
    limit = re.search(r"--xla_cpu_max_isa=(\w+)", environment.get("XLA_FLAGS", ""))
    allowed = limit[1].upper() if limit else "AMX"
    if "amx_bf16" in features and allowed.startswith("AMX"):
        return "matrix"
    if "avx512_bf16" in features and (allowed.startswith("AMX") or allowed == "AVX512_BF16"):
        return "vector"
    return None
