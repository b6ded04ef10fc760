"""Pure functions of the models that have no parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Added to nothing: a score that is masked out becomes this. Finite, so that a row without any valid key gives
# the mean of the values and not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x) with the error function, as torch.nn.GELU() (jax.nn.gelu defaults to the tanh form)."""
    return jax.nn.gelu(x, approximate=False)


def attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim_v"],
    *,
    causal: bool = False,
    key_valid: Bool[Array, "batch keys"] | None = None,
    mask: Bool[Array, "batch #heads queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim_v"]:
    """Scaled dot-product attention with the softmax in float32; the scale is dim ** -0.5.

    Query head h reads key-value head h * kv_heads // heads. `causal` lets query i see keys 0..i. All masks
    that are given apply together; True means "may be seen".

    Equals torch.nn.functional.scaled_dot_product_attention on (batch, heads, tokens, dim) tensors.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    if causal:
        scores = jnp.where(jnp.tri(queries, keys, dtype=bool), scores, MASKED)
    if key_valid is not None:
        scores = jnp.where(key_valid[:, None, None, None, :], scores, MASKED)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (batch, heads, queries, keys))
        scores = jnp.where(mask.reshape(scores.shape), scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, queries, heads, v.shape[-1]).astype(q.dtype)
