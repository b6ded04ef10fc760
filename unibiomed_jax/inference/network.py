"""The network as this machine computes it best: layers in a stack or a list, weights as they multiply."""

from __future__ import annotations

import dataclasses

from flax import nnx

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import FLOAT32, Precision, bfloat16_units
from unibiomed_jax.inference.cpu import split_linears, stored_in_bfloat16
from unibiomed_jax.models.layers import unstack_layers
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import Parameters, flatten, stored_for, unflatten
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.target import target


def build_network(
    config: ModelConfig, params: dict, precision: Precision, layout: Layout
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model and its parameters, to be merged inside a compiled function.

    Args:
        config: the model's sizes.
        params: parameter tree of `UniBiomedModel(config)`, in whatever formats it is stored; it is emptied,
            so that no more than one parameter is held in two of them.
        precision: of the arithmetic.
        layout: divides the model over devices.

    Raises:
        InputError: the strategy does not do on this mesh what it is for.
    """
    in_bfloat16 = stored_in_bfloat16(params["language_model"])
    table = flatten(params)
    params.clear()
    if layout.mesh.size > 1:
        layout.require_useful(table)
        table = layout.place(table)
    with layout.inside():
        on_cpu = target() == ("cpu", 1)
    in_parts = on_cpu and bfloat16_units() == "matrix" and precision.language == "float32" and in_bfloat16

    def make() -> UniBiomedModel:
        model = UniBiomedModel(config, precision, rngs=nnx.Rngs(0))
        if on_cpu:
            # A scan would copy every layer's weights out of the stack for every token.
            model.language_model.layers = unstack_layers(model.language_model.layers)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    if on_cpu:  # before they are widened: a stack beside its layers would double the memory
        _unstack(table, "language_model.layers.", config.language.num_layers)
    stored = dataclasses.replace(precision, language="bfloat16") if in_parts else precision
    nnx.replace_by_pure_dict(state, unflatten(stored_for(table, config, stored)))
    model = nnx.merge(graphdef, state)
    del state  # which would keep what is replaced
    if in_parts:
        split_linears(model.language_model, exact=precision == FLOAT32)
    return nnx.split(model)


def _unstack(table: Parameters, prefix: str, length: int) -> None:
    """Replace the stacks below a path by their layers, `prefix` number `.` rest, in place."""
    for path in [path for path in table if path.startswith(prefix)]:
        stack, rest = table.pop(path), path.removeprefix(prefix)
        table |= {f"{prefix}{index}.{rest}": stack[index] for index in range(length)}
