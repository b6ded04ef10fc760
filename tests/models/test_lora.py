"""Dropout of adapters: which bits, and where a compiler draws them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unibiomed_jax.models.layers import Lora

SIZE = 16


def dropping(dropout: float) -> tuple[nnx.GraphDef, nnx.State]:
    """An adapter that returns what it does not drop."""
    lora = Lora(SIZE, SIZE, SIZE, 1.0, dropout, nnx.Rngs(0))
    lora.a[...], lora.b[...] = jnp.eye(SIZE), jnp.eye(SIZE)
    return nnx.split(lora)


def test_an_adapter_drops_the_bits_of_its_key():
    graphdef, state = dropping(0.5)
    x, key = jnp.full((2, 5, SIZE), 3.0), jax.random.key(7)
    kept = np.asarray(jax.random.bernoulli(key, 0.5, x.shape))
    assert 0 < kept.mean() < 1

    def drop(x):
        return nnx.merge(graphdef, state)(x, key)

    expected = np.where(kept, 6.0, 0.0)
    for run in (drop, jax.jit(drop), jax.jit(jax.checkpoint(drop))):
        np.testing.assert_array_equal(run(x), expected)
    gradient = jax.jit(jax.grad(lambda x: jax.checkpoint(drop)(x).sum()))(x)
    np.testing.assert_array_equal(gradient, expected / 3)
    # In a loop over layers, as the language model has it, each with its own.
    keys = jax.random.split(key, 3)
    _, looped = jax.lax.scan(lambda _, key: (_, nnx.merge(graphdef, state)(x, key)), None, keys)
    np.testing.assert_array_equal(looped, [nnx.merge(graphdef, state)(x, key) for key in keys])


def test_no_product_draws_the_bits_itself():
    """A compiler that fuses them into the product takes a minute for it, and a step has dozens."""
    graphdef, state = dropping(0.5)
    x, key = jnp.ones((2, SIZE)), jax.random.key(7)
    traced = jax.make_jaxpr(lambda x, key: nnx.merge(graphdef, state)(x, key))(x, key)
    made = {var: equation for equation in traced.eqns for var in equation.outvars}
    (chosen,) = [
        e for e in traced.eqns if "_where" in str(e.params.get("name")) or e.primitive.name == "select_n"
    ]
    assert made[chosen.invars[0]].primitive.name == "optimization_barrier"
