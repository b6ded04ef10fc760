"""What the models say about where arrays lie, in the words of `axes`; nothing without a layout in force."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from unibiomed_jax.sharding.axes import logical_axes
from unibiomed_jax.sharding.layout import Layout, axes_of, layout_in_force


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


def by_share(
    function: Callable[..., Any],
    path: str,
    parameter: jax.Array,
    *divided: jax.Array,
    meanings: Sequence[str | None],
) -> Any:
    """`function(parameter, *divided)`, which every device calls for its own share of `divided`.

    Each device adds up the gradient of its own share, and they are summed over the devices once. Left to the
    compiler, they are summed over the devices at every step of a loop, or every device makes those of all.

    Args:
        function: no row may need another one.
        path: of the parameter, dotted.
        parameter: as a computation needs it.
        divided: arrays whose first axes have these `meanings`, as those of what the function returns have.
    """
    layout = layout_in_force()
    if layout is None:
        return function(parameter, *divided)
    spec = layout.activation(divided[0].shape[: len(meanings)], meanings)
    axes = tuple(axis for entry in spec for axis in axes_of(entry))
    if not axes:
        return function(parameter, *divided)
    return jax.shard_map(
        lambda copies, *divided: function(copies[0], *divided),
        in_specs=(PartitionSpec(axes), *[spec] * len(divided)),
        out_specs=spec,
        axis_names=set(axes),
        check_vma=False,
    )(_copies(parameter, layout, path, axes), *divided)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _copies(parameter: jax.Array, layout: Layout, path: str, axes: tuple[str, ...]) -> jax.Array:
    """What every device along these mesh axes has anyway, as an array of so many."""
    spec = PartitionSpec(axes, *layout.spec(path, parameter.shape, "computed"))
    copies = jnp.broadcast_to(parameter, (layout.parts(axes), *parameter.shape))
    return jax.lax.with_sharding_constraint(copies, NamedSharding(layout.mesh, spec))


def _summed(layout: Layout, path: str, axes: tuple[str, ...], _: None, gradients: jax.Array) -> tuple:
    """The sum of gradients, where it can be in the shares in which the parameter is kept."""
    shape = gradients.shape[1:]
    start = [axes_of(entry) for entry in layout.spec(path, shape, "computed")]
    kept = [axes_of(entry) for entry in layout.spec(path, shape, "weights")]
    shares = [
        tuple(axis for axis in now if axis in axes and axis not in before)
        for before, now in zip(start, kept, strict=True)
    ]

    def total(gradient):
        gradient = gradient[0]
        for place, mine in enumerate(shares):
            if mine:
                gradient = jax.lax.psum_scatter(gradient, mine, scatter_dimension=place, tiled=True)
        return jax.lax.psum(gradient, tuple(set(axes).difference(*shares)))

    run = jax.shard_map(
        total,
        in_specs=PartitionSpec(axes, *start),
        out_specs=PartitionSpec(*[(*before, *mine) for before, mine in zip(start, shares, strict=True)]),
        axis_names={*axes, *itertools.chain(*start)},
        check_vma=False,
    )
    return (run(gradients),)


_copies.defvjp(lambda parameter, *how: (_copies(parameter, *how), None), _summed)


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
