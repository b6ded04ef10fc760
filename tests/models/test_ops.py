"""The pure functions against their definitions, written out in numpy, and against stored values of torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unibiomed_jax.models import ops


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
        monkeypatch.setattr(ops, "MAX_SCORES", 3 * 6 * 9)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_reads_the_right_heads(memory, kv_heads):
    q, k, v = random_qkv(kv_heads=kv_heads)
    np.testing.assert_allclose(ops.attention(q, k, v), dense_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize("mask_heads", [1, 6])
def test_attention_masks_apply_together(memory, mask_heads):
    q, k, v = random_qkv()
    rng = np.random.default_rng(1)
    mask = rng.random((2, mask_heads, 7, 9)) < 0.7
    key_valid = rng.random((2, 9)) < 0.7
    key_valid[:, 0] = mask[..., 0] = True
    causal = np.tri(7, 9, dtype=bool)
    for use in ("mask", "key_valid", "causal", "mask key_valid causal"):
        visible, options = np.ones((2, 1, 7, 9), bool), {}
        if "mask" in use:
            visible, options["mask"] = visible & mask, mask
        if "key_valid" in use:
            visible, options["key_valid"] = visible & key_valid[:, None, None], key_valid
        if "causal" in use:
            visible, options["causal"] = visible & causal, True
        result = ops.attention(q, k, v, **options)
        np.testing.assert_allclose(result, dense_attention(q, k, v, visible), atol=1e-6, err_msg=use)


def test_attention_in_chunks_has_the_same_gradient(monkeypatch):
    q, k, v = random_qkv()

    def gradients():
        return jax.grad(lambda *x: jnp.sum(jnp.sin(ops.attention(*x, causal=True))), argnums=(0, 1, 2))(
            q, k, v
        )

    whole = gradients()
    monkeypatch.setattr(ops, "MAX_SCORES", 1)
    for chunked, expected in zip(gradients(), whole, strict=True):
        np.testing.assert_allclose(chunked, expected, atol=1e-6)


def test_attention_without_any_visible_key_is_finite():
    q, k, v = random_qkv()
    assert np.isfinite(ops.attention(q, k, v, key_valid=jnp.zeros((2, 9), bool))).all()


def test_attention_in_bfloat16_keeps_its_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(keys=500))
    result = ops.attention(q * 8, k, v)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), dense_attention(q * 8, k, v), atol=0.02)


def test_decode_attention_equals_attention():
    q, k, v = random_qkv(queries=1, dim_v=8)
    visible = np.arange(9) <= np.array([[3], [8]])
    result = ops.decode_attention(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), visible)
    np.testing.assert_allclose(result, ops.attention(q, k, v, key_valid=visible)[:, 0], atol=1e-6)


def test_gelu_is_exact():
    # x * Phi(x)
    x = np.array([-3.0, -1.0, -0.25, 0.0, 0.5, 2.0], np.float32)
    expected = [-0.00404969, -0.15865526, -0.10032343, 0.0, 0.34573123, 1.9544997]
    np.testing.assert_allclose(ops.gelu(x), expected, atol=1e-7)
    assert ops.gelu(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_rope_turns_pairs_by_their_angle():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2, 7, 40]])
    result = ops.apply_rope(jnp.asarray(x), *ops.rope_table(positions, 6, 1e4))
    angles = positions[0, :, None, None] * 1e4 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)
    np.testing.assert_allclose(result, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_rope_computes_its_angles_in_float32():
    cos, _ = ops.rope_table(jnp.array([[5003]]), 4, 1e6)
    np.testing.assert_allclose(cos[0, 0], np.cos([5003, 5.003, 5003, 5.003]), atol=1e-6)
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    assert ops.apply_rope(x, cos, cos).dtype == jnp.bfloat16


def test_bicubic_equals_torch():
    # torch.nn.functional.interpolate([0, 1, 4, 9, 16], mode="bicubic", align_corners=False) along one axis.
    x = np.array([0, 1, 4, 9, 16], np.float32)
    larger = [-0.1008, 0.1481, 0.7106, 2.0041, 4.0, 6.3388, 9.9726, 14.0741, 16.7058]  # to 9 values
    smaller = [0.1481, 4.0, 14.0741]  # to 3 values
    np.testing.assert_allclose(ops.bicubic_matrix(5, 9) @ x, larger, atol=1e-4)
    np.testing.assert_allclose(ops.bicubic_matrix(5, 3) @ x, smaller, atol=1e-4)
    table = np.random.default_rng(0).standard_normal((5, 7, 2)).astype(np.float32)
    by_axis = np.einsum("ij,jkc->ikc", ops.bicubic_matrix(5, 9), table)
    by_axis = np.einsum("lk,ikc->ilc", ops.bicubic_matrix(7, 3), by_axis)
    np.testing.assert_allclose(ops.resize_bicubic(table, (9, 3)), by_axis, atol=1e-6)
    assert ops.resize_bicubic(table, (5, 7)) is table


def test_bilinear_neither_antialiases_nor_extrapolates():
    x = np.array([0.0, 10, 20, 30], np.float32).reshape(1, 4, 1)
    assert ops.resize_bilinear(x, (1, 8)).ravel().tolist() == [0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30]
    assert ops.resize_bilinear(x, (1, 2)).ravel().tolist() == [5, 25]
    impulse = np.eye(9, dtype=np.float32)[4].reshape(1, 9, 1)
    assert ops.resize_bilinear(impulse, (1, 3)).ravel().tolist() == [0, 1, 0]
