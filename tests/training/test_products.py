"""In which number format, and in how many passes, the products of an update are computed."""

import dataclasses
from collections.abc import Iterator

import jax
import pytest
from jax.extend.core import jaxprs_in_params
from small import IDS, STEP, random_batch

from unibiomed_jax.config.precision import BFLOAT16
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training.config import FreezeConfig
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.start import abstract_state
from unibiomed_jax.training.step import TrainStep


def products(jaxpr) -> Iterator[tuple[set[str], set, set[str]]]:
    """Formats of the operands, precisions, and names of the functions that ask, of every product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            precision = equation.params["precision"]
            traceback = equation.source_info.traceback
            yield (
                {str(operand.aval.dtype) for operand in equation.invars},
                {None} if precision is None else set(precision),
                {frame.function_name.rpartition(".")[2] for frame in traceback.frames}
                if traceback
                else set(),
            )
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.slow
def test_bfloat16_is_multiplied_with_bfloat16_in_one_pass_forward_and_backward():
    """Of an update in which everything trains."""
    everything = FreezeConfig(trainable=("*",), frozen=())
    config = dataclasses.replace(STEP, precision=BFLOAT16, freeze=everything)
    layout = Layout.over(jax.devices()[:1])
    graphdef, shapes = structure(config)
    state = abstract_state(config, shapes, layout)
    step = TrainStep(graphdef, config, IDS, layout).whole
    found = list(products(step.trace(state["train"], state["frozen"], random_batch(0, size=2)).jaxpr.jaxpr))

    default, highest = {jax.lax.Precision.DEFAULT}, {jax.lax.Precision.HIGHEST}
    for formats, precision, functions in found:
        assert (formats, precision) in (({"bfloat16"}, default), ({"float32"}, highest)), functions

    # What computes in float32 under any policy, and its two gradients, which do not know who asked for them.
    exact = [functions for formats, _, functions in found if formats == {"float32"}]
    prompts = sum("prompt_vectors" in functions for functions in exact)
    resized = sum("resize_bicubic" in functions for functions in exact)
    assert prompts and resized
    assert len(exact) <= 3 * prompts + resized
    assert len(found) > 10 * len(exact)
