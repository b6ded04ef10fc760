"""What the models say about where arrays lie, in the words of `axes`; nothing without a layout in force."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from unibiomed_jax.sharding.axes import logical_axes
from unibiomed_jax.sharding.layout import layout_in_force

# What a backward pass does not keep of the forward pass: it gathers a layer again.
GATHERED = "gathered weights"


def constrain(x: jax.Array, *meanings: str | None) -> jax.Array:
    """Divide an activation as the strategy says.

    Without it the axes along which parameters are stored leak into activations, and every device works on the
    whole batch.

    Args:
        x: the activation.
        meanings: of its axes, with or without a tower ("language.heads"); None: whole.
    """
    layout = layout_in_force()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(layout.mesh, layout.activation(x.shape, meanings))
    )


def gathered(prefix: str, parameters: Any) -> Any:
    """The parameters of a module as its computation needs them, gathered from their shares.

    To be called inside the loop over layers, so that one layer exists whole at a time.

    Args:
        prefix: dotted path of the module, without the number of a layer of a stack.
        parameters: its state, a tree of arrays.
    """
    layout = layout_in_force()
    if layout is None:
        return parameters

    def gather(keys, value):
        path = ".".join([prefix, *(str(key.key) for key in keys if hasattr(key, "key"))])
        return checkpoint_name(layout.move(path, value, "weights", "computed"), GATHERED)

    return jax.tree_util.tree_map_with_path(gather, parameters)


def gathers_layers() -> bool:
    """Whether the layers of what is being traced are gathered from shares (see `gathered`)."""
    layout = layout_in_force()
    return layout is not None and layout.gathers


def from_optimizer(table: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A table of masters by dotted path, as parameters lie between uses."""
    layout = layout_in_force()
    if layout is None:
        return table
    return {path: layout.move(path, value, "optimizer", "weights") for path, value in table.items()}


def gather_unstacked(table: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A table of parameters by dotted path, gathered but for stacks of layers, which gather their own."""
    layout = layout_in_force()
    if layout is None:
        return table
    return {
        path: value
        if "layer" in logical_axes(path, value.ndim)
        else layout.move(path, value, "weights", "computed")
        for path, value in table.items()
    }
