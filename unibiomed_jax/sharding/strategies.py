"""Which meaning of an axis is divided over which axes of the device mesh: a strategy is a small table.

A table names axes of activations and of computations ("batch", "tokens", "heads", "mlp", ...), and what is
divided for storage alone ("weights", "optimizer"); `axes.MEANINGS` has all. What it does not name is whole on
every device. Of several mesh axes for one meaning as many are taken, from the left, as divide the axis.
"""

from __future__ import annotations

from collections.abc import Mapping

from unibiomed_jax.errors import InputError

# Meaning of an axis, with or without a tower ("language.heads") -> one mesh axis, or several that divide it
# together.
Strategy = Mapping[str, str | tuple[str, ...]]

# The axes of every mesh, the one with the slowest links between its devices first: copies of everything below
# (slices of a pod), shares of the stored parameters, heads and channels, tokens and frames.
MESH_AXES = ("replica", "fsdp", "tensor", "sequence")

# Every device holds everything and works on its share of the batch.
DATA_PARALLEL: Strategy = {"batch": "replica"}
# The same, but masters and moments, most of what a device holds, exist once (ZeRO-1: Rajbhandari et al. 2020,
# arXiv 1910.02054).
ZERO1: Strategy = {"batch": "replica", "optimizer": "replica"}
# Every device holds a share of the parameters, too, and gathers a layer when it needs it (Zhao et al. 2023,
# arXiv 2304.11277).
FSDP: Strategy = {"batch": "fsdp", "weights": "fsdp"}
# FSDP inside a slice, whose links are fast, and copies of it across slices; the optimiser's state exists
# once.
HSDP: Strategy = {"batch": ("replica", "fsdp"), "weights": "fsdp", "optimizer": ("fsdp", "replica")}
# Heads and channels of the language model are divided (Shoeybi et al. 2019, arXiv 1909.08053). The two vision
# towers, which have most of the work and fewer of the parameters, share out their images instead.
_LANGUAGE: Strategy = {
    "language.heads": "tensor",
    "language.kv_heads": "tensor",
    "language.mlp": "tensor",
    "language.vocab": "tensor",
}
TENSOR: Strategy = {
    "batch": "replica",
    **dict.fromkeys(("tiles", "images", "windows"), ("replica", "tensor")),
    **_LANGUAGE,
}
FSDP_TENSOR: Strategy = {
    "batch": "fsdp",
    "weights": "fsdp",
    **dict.fromkeys(("tiles", "images", "windows"), ("fsdp", "tensor")),
    **_LANGUAGE,
}
# Long rows of tokens and the frames of long volumes are divided, too; queries stay, keys and values are
# gathered.
SEQUENCE: Strategy = {
    "batch": "fsdp",
    "tokens": "sequence",
    "weights": ("fsdp", "sequence"),
    **dict.fromkeys(("tiles", "images", "windows"), ("fsdp", "sequence")),
}

STRATEGIES: dict[str, Strategy] = {
    "data_parallel": DATA_PARALLEL,
    "zero1": ZERO1,
    "fsdp": FSDP,
    "hsdp": HSDP,
    "tensor": TENSOR,
    "fsdp_tensor": FSDP_TENSOR,
    "sequence": SEQUENCE,
}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        InputError: there is none.
    """
    if name not in STRATEGIES:
        raise InputError(f"Unknown sharding strategy {name!r}: choose one of {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


def mesh_axes_of(strategy: Strategy) -> tuple[str, ...]:
    """All mesh axes that a strategy names, in its order."""
    named = (axis for axes in strategy.values() for axis in ((axes,) if isinstance(axes, str) else axes))
    return tuple(dict.fromkeys(named))
