"""Which meaning of an axis is divided over which axes of the device mesh: a strategy is a small table."""

from __future__ import annotations

from collections.abc import Mapping

from unibiomed_jax.errors import InputError

# Meaning of an axis -> one mesh axis, or several that divide it together. What is not named stays whole on
# every device.
Strategy = Mapping[str, str | tuple[str, ...]]

# Every device holds everything and works on its share of the batch.
DATA_PARALLEL: Strategy = {"batch": "data"}
# Beside the batch, every device holds a share of the parameters, gradients and optimiser state, and gathers a
# layer when it needs it (Zhao et al. 2023, arXiv 2304.11277).
FSDP: Strategy = dict.fromkeys(("batch", "embed", "rank", "vision", "trunk", "folded", "mask"), "data")

STRATEGIES: dict[str, Strategy] = {"data_parallel": DATA_PARALLEL, "fsdp": FSDP}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        InputError: there is none.
    """
    if name not in STRATEGIES:
        raise InputError(f"Unknown sharding strategy {name!r}: choose one of {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]
