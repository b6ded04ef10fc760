"""The kernels of TPUs and GPUs against the plain form, and what the compiler of a TPU makes of them."""

from __future__ import annotations

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight import report
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies

from unibiomed_jax.models import attention as attention_module
from unibiomed_jax.models.attention import (
    Choice,
    attention,
    chunk_size,
    implementation,
    recorded_choices,
    xla_attention,
)
from unibiomed_jax.models.layers import REMAT_POLICIES
from unibiomed_jax.models.memory import Memory, RopeAttention
from unibiomed_jax.models.splash import MAX_BLOCK, block_size, splash_attention
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import FSDP
from unibiomed_jax.sharding.target import Target


def random_arrays(batch, queries, keys, heads, kv_heads, dim, dim_v):
    """Queries, keys, values, and what a gradient begins with."""
    rng = np.random.default_rng(0)
    shapes = (
        (batch, queries, heads, dim),
        (batch, keys, kv_heads, dim),
        (batch, keys, kv_heads, dim_v),
        (batch, queries, heads, dim_v),
    )
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def with_gradients(function, q, k, v, g):
    def run(q, k, v, g):
        out, transposed = jax.vjp(function, q, k, v)
        return out, *transposed(g)

    return jax.jit(run)(q, k, v, g)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "causal", "masked"),
    [
        ((1, 140, 140, 2, 1, 16, 16), True, False),  # as the language model, filled up to 256
        ((2, 16, 140, 1, 1, 16, 8), False, True),  # as the memory: values of other width, keys not valid
        ((6, 16, 32, 2, 2, 24, 24), False, False),  # as Hiera's windows: several in a block
    ],
    ids=["causal", "masked", "windows"],
)
def test_the_kernel_equals_the_plain_form(shape, causal, masked):
    arrays = random_arrays(*shape)
    key_valid = None
    if masked:
        key_valid = jnp.asarray(np.random.default_rng(1).random(arrays[1].shape[:2]) < 0.7)
        key_valid = key_valid.at[:, 5].set(True)
    options = {"causal": causal, "key_valid": key_valid}
    kernel = {"layout": None, "axes": (None, None, None), "interpret": True}
    found = with_gradients(lambda *x: splash_attention(*x, **options, **kernel), *arrays)
    assert_equal(found, with_gradients(lambda *x: xla_attention(*x, **options), *arrays))


def test_the_memory_read_at_once_is_the_memory_read_slot_by_slot():
    """At once for a kernel, in turn for a CPU; empty slots and pointers count in neither."""
    dim, channels, grid, slots, objects, tokens = 16, 8, 4, 3, 2, 5
    layer = RopeAttention(dim, channels, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    memory = Memory(
        frames=random(slots, objects, grid**2, channels),
        time=random(slots, channels),
        frames_valid=jnp.array([True, False, True]),
        pointers=random(objects, tokens, channels),
        pointers_valid=jnp.arange(tokens) != 2,
    )
    q = 4 * random(objects, grid**2, dim)
    at_once, in_turn = (
        jax.jit(lambda q, memory, read=read: read(q, memory, grid))(q, memory)
        for read in (layer._read_at_once, layer._read_in_turn)
    )
    assert_equal([at_once], [in_turn])


@given(length=st.integers(1, 50_000))
def test_blocks_are_multiples_of_128_and_fill_little_up(length):
    block = block_size(length)
    assert block % 128 == 0 and block <= MAX_BLOCK
    assert -length % block < (128 if length <= MAX_BLOCK else 256)


@pytest.mark.scale
def test_every_device_runs_the_kernel_for_its_share():
    for name, difference in report("sharded_attention.py").items():
        assert difference < 1e-5, name


# ------------------------------------------------------------------------------------------------------------
# what a TPU's compiler makes of it

LONG = 1025  # tokens of a tile


def score_matrices(text: str) -> set[str]:
    """Shapes in a compiled program that are as long as the tokens in two directions."""
    shapes = re.findall(r"\w+\[([0-9,]+)\]", text)
    return {shape for shape in shapes if sum(int(n) >= LONG for n in shape.split(",")) > 1}


@pytest.fixture
def v5e(monkeypatch):
    """Four chips that nobody has."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed, which compiles for TPUs.")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.mark.slow
def test_a_tpu_holds_no_scores(v5e):
    layout = Layout.over(v5e, FSDP)

    def gradient(q, k, v):
        def loss(*x):
            out = attention(*x, tower="vision", axes=("vision.tiles", None, None))
            return out.astype(jnp.float32).sum()

        with jax.default_matmul_precision("highest"):
            return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    arrays = [jax.ShapeDtypeStruct((4, LONG, 1, 64), jnp.bfloat16, sharding=layout.batch)] * 3
    with recorded_choices() as choices:
        lowered = layout.jit(gradient).lower(*arrays)
    assert choices == [Choice("vision", "splash", LONG, LONG, "bfloat16")]
    text = lowered.compile().as_text()
    # Forward, and the gradients of the queries and of keys and values; of its own tile alone.
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not re.search("all-gather|all-reduce|all-to-all", text)
    assert not score_matrices(text)
    plain = jax.jit(xla_attention).lower(*random_arrays(1, LONG, LONG, 1, 1, 8, 8)[:3]).compile().as_text()
    assert score_matrices(plain)


@pytest.mark.parametrize(("remat", "kernels"), [("dots", 3), ("full", 4)])
def test_the_kernel_runs_again_on_the_way_back_only_where_all_is_computed_again(remat, kernels):
    def loss(x):
        options = {"causal": True, "key_valid": None, "layout": None, "axes": (None, None, None)}
        block = jax.checkpoint(lambda x: splash_attention(x, x, x, **options), policy=REMAT_POLICIES[remat])
        return block(x).astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((1, 128, 1, 8), jnp.bfloat16)
    text = jax.jit(jax.value_and_grad(loss)).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels


# ------------------------------------------------------------------------------------------------------------
# which is chosen


@pytest.mark.parametrize(
    ("platform", "arguments", "masked", "expected"),
    [
        ("cpu", ("bfloat16", 1025, 1025, 64, 64), False, "xla"),
        (None, ("bfloat16", 1025, 1025, 64, 64), False, "xla"),
        ("tpu", ("bfloat16", 1025, 1025, 64, 64), False, "splash"),
        ("tpu", ("float32", 4096, 45_136, 256, 64), True, "splash"),
        ("tpu", ("bfloat16", 8, 4096, 16, 16), False, "xla"),  # the mask decoder's few tokens
        ("gpu", ("bfloat16", 1025, 1025, 64, 64), False, "cudnn"),
        ("gpu", ("float32", 1025, 1025, 64, 64), False, "xla"),
        ("gpu", ("bfloat16", 1025, 1025, 64, 64), True, "xla"),
        ("gpu", ("bfloat16", 4096, 4096, 256, 256), False, "xla"),
        ("gpu", ("bfloat16", 1, 4096, 64, 64), False, "xla"),
    ],
)
def test_what_computes_attention_follows_from_target_format_and_shape(platform, arguments, masked, expected):
    assert implementation(platform, *arguments, masked=masked) == expected


def test_cudnn_gets_what_the_plain_form_gets(monkeypatch):
    """With JAX's own plain form in the place of cuDNN."""
    asked = []

    def plain(q, k, v, *, is_causal, implementation):
        asked.append(implementation)
        return dot_product_attention(q, k, v, is_causal=is_causal, implementation="xla")

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    monkeypatch.setattr(attention_module, "implementation", lambda *_, **__: "cudnn")
    arrays = random_arrays(2, 20, 20, 4, 2, 8, 8)
    found = with_gradients(lambda *x: attention(*x, tower="language", causal=True), *arrays)
    assert_equal(found, with_gradients(lambda *x: xla_attention(*x, causal=True), *arrays))
    assert asked == ["cudnn"]


@pytest.mark.parametrize(("devices", "expected"), [(1, 128), (8, 1280)])
def test_chunks_of_an_accelerator_are_multiples_of_128_and_know_the_batch(monkeypatch, devices, expected):
    monkeypatch.setattr(attention_module, "target", lambda: Target("gpu", devices))
    assert chunk_size(batch=8, queries=3840, scores=2**25 // 1280) == expected
