"""The network as this machine computes it best: layers in a stack or a list, weights as they multiply."""

from __future__ import annotations

import dataclasses

from flax import nnx

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import FLOAT32, Precision, bfloat16_units
from unibiomed_jax.inference.cpu import split_linears, stored_in_bfloat16
from unibiomed_jax.models.layers import layer_at, unstack_layers
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import flatten, stored_for, unflatten
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.target import target


def build_network(
    config: ModelConfig, params: dict, precision: Precision, layout: Layout
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model and its parameters, to be merged inside a compiled function.

    Args:
        config: the model's sizes.
        params: parameter tree of `UniBiomedModel(config)`, in whatever formats it is stored.
        precision: of the arithmetic.
        layout: divides the model over devices.

    Raises:
        InputError: the strategy does not do on this mesh what it is for.
    """
    if layout.mesh.size > 1:
        table = flatten(params)
        layout.require_useful(table)
        params = unflatten(layout.place(table))
    with layout.inside():
        on_cpu = target() == ("cpu", 1)
    in_parts = (
        on_cpu
        and bfloat16_units() == "matrix"
        and precision.language == "float32"
        and stored_in_bfloat16(params["language_model"])
    )

    def make() -> UniBiomedModel:
        model = UniBiomedModel(config, precision, rngs=nnx.Rngs(0))
        if on_cpu:
            # A scan would copy every layer's weights out of the stack for every token.
            model.language_model.layers = unstack_layers(model.language_model.layers)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    if on_cpu:  # before they are widened: a stack beside its layers would double the memory
        language = params["language_model"]
        layers = {i: layer_at(language["layers"], i) for i in range(config.language.num_layers)}
        params = {**params, "language_model": {**language, "layers": layers}}
    stored = dataclasses.replace(precision, language="bfloat16") if in_parts else precision
    nnx.replace_by_pure_dict(state, stored_for(params, config, stored))
    model = nnx.merge(graphdef, state)
    if in_parts:
        split_linears(model.language_model, exact=precision == FLOAT32)
    return nnx.split(model)
