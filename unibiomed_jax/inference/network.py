"""The network as this machine computes it best: layers in a stack or a list, weights as they multiply."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from unibiomed_jax import runtime
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
    if layout.mesh.size > 1:
        layout.require_useful(table)
    params.clear()
    if layout.mesh.size > 1:
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
    numbers = dataclasses.replace(precision, language="bfloat16") if in_parts else precision
    stored: Parameters = {}
    for path in list(table):  # one by one: all of them in two formats would be half as much again
        parts = _layers(path, table.pop(path)) if on_cpu else {path: table.pop(path)}
        stored |= stored_for(parts, config, numbers)
    nnx.replace_by_pure_dict(state, unflatten(stored))
    model = nnx.merge(graphdef, state)
    del stored, parts, state  # which would keep what is replaced
    if in_parts:
        split_linears(model.language_model, exact=precision == FLOAT32)
    runtime.release()
    return nnx.split(model)


def _layers(path: str, value: jax.Array) -> Parameters:
    """A stack of the language model as its layers, before it is widened; any other parameter as it is."""
    prefix = "language_model.layers."
    if not path.startswith(prefix):
        return {path: value}
    rest = path.removeprefix(prefix)
    return {f"{prefix}{index}.{rest}": value[index] for index in range(len(value))}
