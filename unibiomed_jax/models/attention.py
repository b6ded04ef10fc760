"""The one door through which every attention of the model goes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import layout as jax_layout
from jaxtyping import Array, Bool, Float

from unibiomed_jax.sharding.target import target

# A score that is masked out becomes this. Finite, so that a row without any valid key gives
# the mean of the values and not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Attention scores (float32) that one row of a batch holds at a time; 2**25 of them are 128 MiB.
MAX_SCORES = 2**25


def row_major(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Make a transpose move memory on a CPU, where XLA's fused attention kernel needs it; a no-op elsewhere.

    Also a no-op where several devices share the program (`sharding.target`): jax 0.10 would gather an array
    on all of them to lay it out.
    """
    if target().devices > 1:
        return x
    constrain = functools.partial(
        jax_layout.with_layout_constraint, layouts=jax_layout.Layout(tuple(range(x.ndim)))
    )
    return jax.lax.platform_dependent(jnp.asarray(x), cpu=constrain, default=lambda x: x)


def attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim_v"],
    *,
    causal: bool = False,
    key_valid: Bool[Array, "batch keys"] | None = None,
    mask: Bool[Array, "batch heads_or_1 queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim_v"]:
    """Scaled dot-product attention with the softmax in float32; the scale is dim ** -0.5.

    Query head h reads key-value head h * kv_heads // heads. `causal` lets query i see keys 0..i. All masks
    that are given apply together; True means "may be seen". Queries are taken in chunks when there are so
    many scores that memory matters; the backward pass then computes a chunk's scores again.

    Equals torch.nn.functional.scaled_dot_product_attention on (batch, heads, tokens, dim) tensors.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # Queries before the heads that share their keys: devices may each hold some of the queries.
    q = q.reshape(batch, queries, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    k, v = (row_major(x.swapaxes(1, 2)) for x in (k, v))
    if mask is not None:
        mask = mask.reshape(batch, min(mask.shape[1], kv_heads), -1, queries, keys).swapaxes(2, 3)

    def attend(q, rows, mask):
        """The queries with these row numbers, as (batch, kv_heads, rows, group, dim)."""
        visible = [] if mask is None else [mask]
        if causal:
            visible.append((jnp.arange(keys) <= rows[:, None])[None, None, :, None])
        if key_valid is not None:
            visible.append(key_valid[:, None, None, None])
        folded = row_major(q.reshape(batch, kv_heads, -1, dim))
        scores = jnp.einsum("bgqd,bgkd->bgqk", folded, k, preferred_element_type=jnp.float32) * dim**-0.5
        if visible:  # added, because a select would break XLA's fused kernel on a CPU
            bias = jnp.where(functools.reduce(jnp.logical_and, visible), 0, MASKED)
            bias = jnp.broadcast_to(bias, (*bias.shape[:2], len(rows), group, keys))
            scores = scores + bias.reshape(*bias.shape[:2], -1, keys)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bgqk,bgkd->bgqd", weights, v, preferred_element_type=jnp.float32)
        return out.astype(v.dtype).reshape(*q.shape[:-1], v.shape[-1])

    chunks = -(-queries // max(1, MAX_SCORES // (heads * keys)))
    if chunks == 1:
        out = attend(q, jnp.arange(queries), mask)
    else:
        size = -(-queries // chunks)

        def cut(x, axis):
            """Deal the query axis out to chunks that lead; zeros fill it up."""
            filled = jnp.pad(x, [(0, chunks * size - queries if i == axis else 0) for i in range(x.ndim)])
            dealt = filled.reshape(*x.shape[:axis], size, chunks, *x.shape[axis + 1 :])
            return jnp.moveaxis(dealt, axis + 1, 0)

        cuts = (cut(q, 2), cut(jnp.arange(queries), 0), None if mask is None else cut(mask, 2))
        out = jax.lax.map(jax.checkpoint(lambda args: attend(*args)), cuts)
        out = jnp.moveaxis(out, 0, 3).reshape(*q.shape[:2], chunks * size, group, -1)[:, :, :queries]
    return row_major(out.transpose(0, 2, 1, 3, 4)).reshape(batch, queries, heads, -1)


def decode_attention(
    q: Float[Array, "batch heads dim"],
    keys: Float[Array, "batch kv_heads slots dim"],
    values: Float[Array, "batch kv_heads slots dim"],
    visible: Bool[Array, "batch slots"],
) -> Float[Array, "batch heads dim"]:
    """`attention` of a single query a row over a cache, of which it sees the `visible` slots.

    The operands are in the order that lets both products read the cache as it lies in memory.
    """
    batch, kv_heads, _, dim = keys.shape
    grouped = q.reshape(batch, kv_heads, -1, dim)
    batched = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(
        keys, grouped, (((3,), (3,)), batched), preferred_element_type=jnp.float32
    )  # (batch, kv_heads, slots, group)
    scores = jnp.where(visible[:, None, :, None], scores * dim**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=2).astype(values.dtype)
    out = jax.lax.dot_general(
        weights, values, (((2,), (2,)), batched), preferred_element_type=jnp.float32
    )  # (batch, kv_heads, group, dim)
    return out.reshape(q.shape).astype(q.dtype)


def running_softmax(
    state: tuple[Float[Array, "queries 1"], Float[Array, "queries 1"], Float[Array, "queries channels"]],
    q: Float[Array, "queries dim"],
    keys: Float[Array, "keys dim"],
    values: Float[Array, "keys channels"],
    valid: Bool[Array, "keys"] | None = None,
) -> tuple[Float[Array, "queries 1"], Float[Array, "queries 1"], Float[Array, "queries channels"]]:
    """Attend to some more keys (Milakov and Gimelshein 2018, arXiv 1805.02867), in float32.

    The state holds the largest score so far, and the sums of the weights and of the weighted values.
    """
    maximum, total, mixed = state
    scores = jnp.matmul(q, keys.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if valid is not None:
        scores = jnp.where(valid, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(-1, keepdims=True))
    shrink, weights = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum)
    added = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return new_maximum, total * shrink + weights.sum(-1, keepdims=True), mixed * shrink + added
