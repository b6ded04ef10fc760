"""The linear layer of the language model on a CPU computes what float32 computes."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from places import MICRO

from unibiomed_jax import UniBiomed
from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.conversion.from_torch import read_released
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference import network
from unibiomed_jax.inference.cpu import (
    EXACT_PARTS,
    FAST_PARTS,
    MAX_DECODE_ROWS,
    SplitLinear,
    bfloat16_parts,
    split_linears,
)
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.models.layers import Linear, unstack_layers
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.parameters import stored_for

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("parts", "error"), [(1, 2**-8), (2, 2**-16), (3, 2**-23)])
def test_the_parts_of_a_split_add_up_to_the_number(parts, error):
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    numbers = [np.asarray(part) for part in jax.jit(bfloat16_parts, static_argnums=1)(x, parts)]
    for number in numbers:
        np.testing.assert_array_equal(number, number.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(np.sum(numbers, axis=0, dtype=np.float64), x, rtol=error)


@pytest.mark.parametrize(
    ("rows", "parts", "error"),
    [
        (1, FAST_PARTS, 1e-6),
        (7, FAST_PARTS, 1e-6),
        (MAX_DECODE_ROWS, FAST_PARTS, 1e-6),
        (MAX_DECODE_ROWS + 1, FAST_PARTS, 1e-5),
        (40, FAST_PARTS, 1e-5),
        (40, EXACT_PARTS, 1e-6),
    ],
)
def test_split_linear_equals_linear(rows, parts, error):
    linear = Linear(96, 40, rngs=nnx.Rngs(0))
    linear.kernel[...] = linear.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    x = jax.random.normal(jax.random.key(1), (rows, 96))
    product = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64)
    # Of the product alone, since the bias would hide what it lacks.
    linear.bias[...] = jnp.zeros(40)
    found = np.asarray(jax.jit(SplitLinear(linear, parts))(x))
    assert np.abs(found - product).max() <= error * np.abs(product).max()
    linear.bias[...] = jnp.arange(40.0)
    np.testing.assert_allclose(jax.jit(SplitLinear(linear, parts))(x), found + np.arange(40.0), rtol=1e-6)


@pytest.mark.parametrize(("batch", "exact", "error"), [(1, False, 1e-6), (3, False, 1e-5), (3, True, 1e-6)])
def test_a_language_model_of_split_linears_says_the_same(batch, exact, error):
    config = LanguageConfig(
        vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96
    )
    model = Qwen2(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state)
    model = nnx.merge(graphdef, state)
    embeds = jax.random.normal(jax.random.key(1), (batch, 9, 64))
    expected = model.logits(model(embeds))
    model.layers = unstack_layers(model.layers)
    split_linears(model, exact=exact)
    assert isinstance(model.layers[0].mlp.gate_proj, SplitLinear)
    assert jnp.abs(model.logits(model(embeds)) - expected).max() <= error * jnp.abs(expected).max()


@pytest.mark.parametrize("units", ["matrix", "vector", None])
def test_the_predictor_splits_a_checkpoint_stored_in_bfloat16_where_there_are_matrix_units(
    monkeypatch, units
):
    monkeypatch.setattr(network, "bfloat16_units", lambda: units)
    folder = MICRO
    loaded = read_released(folder)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params["language_model"])
    wide = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    answers = []
    for language in (rounded, wide):
        params = {**loaded.params, "language_model": language}
        model = UniBiomed(loaded.config, params, Tokenizer.from_folder(folder), precision=FLOAT32)
        is_split = isinstance(model_of(model).language_model.lm_head, SplitLinear)
        assert is_split == (units == "matrix" and language is rounded)
        answers.append(model.predict(None, "What is a CT scan?", max_new_tokens=12).text)
    assert answers[0] == answers[1]


def test_parameters_outlive_a_layout_that_is_refused():
    """So that another one can be tried with them."""

    def refuse(table):
        raise InputError("Another mesh.")

    loaded = read_released(MICRO)
    parts, layout = set(loaded.params), SimpleNamespace(mesh=SimpleNamespace(size=2), require_useful=refuse)
    with pytest.raises(InputError, match="Another mesh"):
        network.build_network(loaded.config, loaded.params, FLOAT32, layout)
    assert set(loaded.params) == parts


def test_no_stack_of_layers_is_widened_beside_the_layers(monkeypatch):
    """It would double the memory of the largest part while a model is loaded."""
    widened = {}

    def watched(table, *arguments):
        widened.update(table)
        return stored_for(table, *arguments)

    monkeypatch.setattr(network, "stored_for", watched)
    loaded = read_released(MICRO)
    stack = loaded.params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"].shape
    model = UniBiomed(loaded.config, loaded.params, Tokenizer.from_folder(MICRO), precision=FLOAT32)
    kernels = [x for path, x in widened.items() if path.endswith("up_proj.kernel")]
    assert [x.shape for x in kernels] == [stack[1:]] * stack[0] and not loaded.params
    # Nor is it held by the model that computes.
    assert max(x.ndim for x in jax.tree.leaves(model.params["language_model"])) == 2


def model_of(model):
    return nnx.merge(model.graphdef, model.params)
