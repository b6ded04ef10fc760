"""What the models say about where arrays lie, in the words of `axes`; nothing without a layout in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from unibiomed_jax.sharding.axes import logical_axes
from unibiomed_jax.sharding.layout import layout_in_force


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

    def gather(layout, path, value):
        return layout.move(path, value, "weights", "computed")

    return _each(gather, parameters, prefix)


def gathers_layers() -> bool:
    """Whether the layers of what is being traced are gathered from shares (see `gathered`)."""
    layout = layout_in_force()
    return layout is not None and layout.gathers


def gather_unstacked(parameters: Any) -> Any:
    """A table or tree of parameters, gathered but for stacks of layers, which gather their own."""

    def gather(layout, path, value):
        if "layer" in logical_axes(path, value.ndim):
            return value
        return layout.move(path, value, "weights", "computed")

    return _each(gather, parameters)


def from_optimizer(masters: Any) -> Any:
    """A table or tree of masters, as parameters lie between uses."""
    return _each(lambda layout, path, value: layout.move(path, value, "optimizer", "weights"), masters)


def _each(move: Callable, parameters: Any, prefix: str = "") -> Any:
    """`move(layout, path, value)` of every parameter; nothing without a layout in force."""
    layout = layout_in_force()
    if layout is None:
        return parameters

    def moved(keys, value):
        names = (str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))
        return move(layout, ".".join(filter(None, (prefix, *names))), value)

    return jax.tree_util.tree_map_with_path(moved, parameters)
