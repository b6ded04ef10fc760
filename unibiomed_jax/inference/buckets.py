"""The few sizes that compiled functions are called with, so that nothing compiles again once warm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float

from unibiomed_jax.sharding.target import target


def power_of_two(count: int) -> int:
    """The smallest power of two that holds `count` images or objects."""
    return 1 << (count - 1).bit_length()


def token_bucket(length: int) -> int:
    """The smallest allowed size that holds `length`: in steps of 32, from 512 on of an eighth of the size."""
    step = max(32, power_of_two(length) // 16)
    return -(-length // step) * step


def frame_bucket(count: int) -> int:
    """Steps of 8 frames up to 64, then an eighth of the power of two."""
    step = max(8, power_of_two(count) // 8)
    return -(-count // step) * step


def tile_bucket(count: int) -> int:
    """Tiles of an image in a call of fixed shape: none, one, or a multiple of four and the thumbnail."""
    return count if count < 2 else 1 + -(-(count - 1) // 4) * 4


def tile_chunks() -> tuple[int, ...]:
    """How many tiles go through the vision model at a time: a CPU gains nothing from more than one.

    To be asked inside the layout of the model (`Layout.inside`).
    """
    return (1,) if target() == ("cpu", 1) else (8, 4, 2, 1)


def in_chunks(
    function: Callable[[np.ndarray], Array], array: Float[np.ndarray, "rows *rest"], sizes: Sequence[int]
) -> Float[np.ndarray, "rows *rest2"]:
    """Apply a compiled function along the first axis in chunks of the given sizes, which descend to 1."""
    outputs, start = [], 0
    for size in sizes:
        while len(array) - start >= size:
            outputs.append(function(array[start : start + size]))
            start += size
    return np.concatenate([np.asarray(output) for output in outputs])
