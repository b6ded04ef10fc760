"""Attention against its definition, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unibiomed_jax.models import attention as attention_module
from unibiomed_jax.models.attention import decode_attention, xla_attention


def dense_attention(q, k, v, visible=None):
    """Softmax attention in float64, one (batch, head) at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    group = heads // k.shape[2]
    out = np.zeros((batch, queries, heads, v.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            scores = q[b, :, h] @ k[b, :, h // group].T / np.sqrt(dim)
            if visible is not None:
                scores = np.where(
                    np.broadcast_to(visible, (batch, heads, *scores.shape))[b, h], scores, -np.inf
                )
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h // group]
    return out


def random_qkv(batch=2, queries=7, keys=9, heads=6, kv_heads=2, dim=8, dim_v=5):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim_v)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.fixture(params=["whole", "in chunks"])
def memory(request, monkeypatch):
    """Run a test with all scores at once, and with three queries at a time."""
    if request.param == "in chunks":
        monkeypatch.setattr(attention_module, "MAX_SCORES", 3 * 6 * 9)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_reads_the_right_heads(memory, kv_heads):
    q, k, v = random_qkv(kv_heads=kv_heads)
    np.testing.assert_allclose(xla_attention(q, k, v), dense_attention(q, k, v), atol=1e-6)


def test_attention_masks_apply_together(memory):
    q, k, v = random_qkv()
    key_valid = np.random.default_rng(1).random((2, 9)) < 0.7
    key_valid[:, 0] = True
    causal = np.tri(7, 9, dtype=bool)
    for use in ("key_valid", "causal", "key_valid causal"):
        visible, options = np.ones((2, 1, 7, 9), bool), {}
        if "key_valid" in use:
            visible, options["key_valid"] = visible & key_valid[:, None, None], key_valid
        if "causal" in use:
            visible, options["causal"] = visible & causal, True
        result = xla_attention(q, k, v, **options)
        np.testing.assert_allclose(result, dense_attention(q, k, v, visible), atol=1e-6, err_msg=use)


def test_attention_in_chunks_has_the_same_gradient(monkeypatch):
    q, k, v = random_qkv()

    def gradients():
        return jax.grad(lambda *x: jnp.sum(jnp.sin(xla_attention(*x, causal=True))), argnums=(0, 1, 2))(
            q, k, v
        )

    whole = gradients()
    monkeypatch.setattr(attention_module, "MAX_SCORES", 1)
    for chunked, expected in zip(gradients(), whole, strict=True):
        # Sums of another order: a few roundings of float32.
        np.testing.assert_allclose(chunked, expected, rtol=1e-6, atol=1e-6)


def test_attention_without_any_visible_key_is_finite():
    q, k, v = random_qkv()
    assert np.isfinite(xla_attention(q, k, v, key_valid=jnp.zeros((2, 9), bool))).all()


def test_attention_in_bfloat16_keeps_its_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(keys=500))
    result = xla_attention(q * 8, k, v)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), dense_attention(q * 8, k, v), atol=0.02)


def test_decode_attention_equals_attention():
    q, k, v = random_qkv(queries=1, dim_v=8)
    visible = np.arange(9) <= np.array([[3], [8]])
    result = decode_attention(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), visible)
    np.testing.assert_allclose(result, xla_attention(q, k, v, key_valid=visible)[:, 0], atol=1e-6)
