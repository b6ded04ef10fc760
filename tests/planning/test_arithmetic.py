"""Operations counted from a jaxpr against what XLA counts of the same model without loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.models.layers import unstack_layers
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.planning.arithmetic import operations, text

# Wide enough that matrix products outweigh everything else.
WIDE = LanguageConfig(
    vocab_size=512, hidden_size=256, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=1024
)


def test_a_scanned_model_counts_as_an_unrolled_one():
    """Forward and backward; XLA counts the body of a loop once, so it counts the unrolled model."""

    def gradient(unrolled: bool):
        def make():
            model = Qwen2(WIDE, rngs=nnx.Rngs(0))
            if unrolled:
                model.layers = unstack_layers(model.layers)
            return model

        graphdef, state = nnx.split(nnx.eval_shape(make))

        def loss(state, embeds):
            return nnx.merge(graphdef, state)(embeds).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss)).trace(state, jax.ShapeDtypeStruct((2, 128, 256), jnp.float32))

    counted = sum(operations(gradient(False).jaxpr).values())
    unrolled = gradient(True)
    assert sum(operations(unrolled.jaxpr).values()) == pytest.approx(counted)
    assert counted == pytest.approx(unrolled.lower().compile().cost_analysis()["flops"], rel=0.05)


def test_operations_are_told_apart_by_number_format_and_precision():
    half, single = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 16))

    def both(half, single):
        rough = jnp.matmul(half, half.T, preferred_element_type=jnp.float32)
        with jax.default_matmul_precision("highest"):
            return rough.sum() + (single @ single.T).sum()

    found = {text(kind): count for kind, count in operations(jax.make_jaxpr(both)(half, single)).items()}
    assert found == {"bfloat16": 2 * 4 * 8 * 4, "float32 at 'highest'": 2 * 8 * 16 * 8}


def test_loops_count_as_often_as_they_run_and_of_branches_the_largest():
    x = jnp.ones((8, 8))
    product = 2 * 8**3

    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def remembered(x):
        return jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ x))(x).sum())(x)

    def total(function, **options):
        return sum(operations(jax.make_jaxpr(function)(x), **options).values())

    assert total(looped) == 5 * product
    assert total(until, unknown_trips=7) == 7 * product
    assert total(either) == 2 * product
    assert total(remembered) == 4 * product  # forward, again, and two ways back


def test_what_devices_do_by_themselves_counts_for_all_of_them():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("all",))
    spread = jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    assert sum(operations(jax.make_jaxpr(spread)(jnp.ones((8, 8)))).values()) == 2 * 8**3


def test_convolutions():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    jaxpr = jax.make_jaxpr(convolve)(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16)))
    assert sum(operations(jaxpr).values()) == 2 * 4 * 4 * 16 * 3 * 3 * 3
