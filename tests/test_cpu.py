"""The linear layer for decoding on a CPU computes what float32 computes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.from_torch import read_released
from unibiomed_jax import UniBiomed
from unibiomed_jax.config import LanguageConfig
from unibiomed_jax.inference.cpu import SplitLinear, split, split_linears
from unibiomed_jax.inference.precision import FLOAT32
from unibiomed_jax.inference.tokenizer import Tokenizer
from unibiomed_jax.models.layers import Linear, unstack_layers
from unibiomed_jax.models.qwen2 import Qwen2


def test_the_parts_of_a_split_add_up_to_the_number_itself():
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    parts = np.asarray(jax.jit(split)(x)).astype(np.float64).reshape(64, 3, 5)
    assert (parts.sum(1).T == x).mean() > 0.99
    np.testing.assert_allclose(parts.sum(1).T, x, rtol=2**-23)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_split_linear_equals_linear(rows):
    linear = Linear(96, 40, rngs=nnx.Rngs(0))
    linear.kernel[...] = linear.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    linear.bias[...] = jnp.arange(40.0)
    x = jax.random.normal(jax.random.key(1), (rows, 96))
    expected = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64) + np.arange(40.0)
    np.testing.assert_allclose(jax.jit(SplitLinear(linear))(x), expected, rtol=1e-6, atol=1e-6)


def test_a_language_model_of_split_linears_says_the_same():
    config = LanguageConfig(
        vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96
    )
    model = Qwen2(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state)
    model = nnx.merge(graphdef, state)
    embeds = jax.random.normal(jax.random.key(1), (2, 9, 64))
    expected = model.logits(model(embeds))
    model.layers = unstack_layers(model.layers)
    split_linears(model)
    assert isinstance(model.layers[0].mlp.gate_proj, SplitLinear)
    np.testing.assert_allclose(model.logits(model(embeds)), expected, rtol=1e-5, atol=1e-6)


def test_the_predictor_splits_a_checkpoint_stored_in_bfloat16():
    folder = Path(__file__).parent / "golden" / "micro" / "checkpoint"
    loaded = read_released(folder)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params["language_model"])
    wide = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    answers = []
    for language in (rounded, wide):
        params = {**loaded.params, "language_model": language}
        model = UniBiomed(loaded.config, params, Tokenizer.from_folder(folder), precision=FLOAT32)
        is_split = isinstance(model_of(model).language_model.lm_head, SplitLinear)
        assert is_split == (language is rounded)
        answers.append(model.predict(None, "What is a CT scan?", max_new_tokens=12).text)
    assert answers[0] == answers[1]


def model_of(predictor):
    return nnx.merge(predictor.graphdef, predictor.params)
