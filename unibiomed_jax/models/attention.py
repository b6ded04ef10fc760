"""The one door through which every attention of the model goes.

What computes it is decided by what the program is compiled for and by the number format, and by nothing that
may fail later: `implementation` says it, and a kernel that a device refuses is an error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import layout as jax_layout
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float

from unibiomed_jax.models.layers import einsum, one_pass
from unibiomed_jax.models.splash import splash_attention
from unibiomed_jax.sharding.layout import Layout, layout_in_force
from unibiomed_jax.sharding.target import target

# "xla": products and a softmax that the compiler fuses as it can; holds the scores of a chunk of queries.
# "splash": the Pallas kernel of a TPU. "cudnn": NVIDIA's. These two never hold scores.
Implementation = Literal["xla", "splash", "cudnn"]

# With fewer queries or keys the scores are no larger than what they are made of, and a kernel's blocks would
# be nearly empty.
FEWEST = 16

# A score that is masked out becomes this. Finite, so that a row without any valid key gives
# the mean of the values and not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Attention scores (float32) that one row of a batch holds at a time; 2**25 of them are 128 MiB.
MAX_SCORES = 2**25


class Choice(NamedTuple):
    """What computes one attention of a program."""

    # The part of the model, such as "language".
    tower: str
    implementation: Implementation
    # Of queries and keys of one head.
    queries: int
    keys: int
    dtype: str


_choices: ContextVar[list[Choice] | None] = ContextVar("choices", default=None)
_exported: ContextVar[bool] = ContextVar("exported", default=False)


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Note which implementation every attention gets that is traced inside, each once."""
    before = _choices.set(found := [])
    try:
        yield found
    finally:
        _choices.reset(before)


@contextlib.contextmanager
def exported() -> Iterator[None]:
    """Inside, programs are traced that other machines will run: without calls of cuDNN, of which none is
    sure to mean the same in another version.
    """
    before = _exported.set(True)
    try:
        yield
    finally:
        _exported.reset(before)


def implementation(
    platform: str | None,
    dtype: DTypeLike,
    queries: int,
    keys: int,
    dim: int,
    dim_v: int,
    *,
    masked: bool = False,
) -> Implementation:
    """What computes an attention on devices of a kind.

    Args:
        platform: "cpu", "gpu", "tpu"; None: unknown.
        dtype: of queries, keys and values. cuDNN multiplies no float32.
        queries: of one head.
        keys: of one head.
        dim: channels of queries and keys of one head; cuDNN takes multiples of 8 up to 128.
        dim_v: channels of values.
        masked: not all keys are seen, and which is no plain triangle; cuDNN would hold a matrix that says so.
    """
    if min(queries, keys) < FEWEST:
        return "xla"
    if platform == "tpu":
        return "splash"
    fits_cudnn = (
        jnp.dtype(dtype) == jnp.bfloat16 and dim % 8 == 0 and dim <= 128 and dim == dim_v and not masked
    )
    return "cudnn" if platform == "gpu" and fits_cudnn else "xla"


def choose(
    tower: str, dtype: DTypeLike, queries: int, keys: int, dim: int, dim_v: int, *, masked: bool = False
) -> Implementation:
    """`implementation` for what is being traced, which `recorded_choices` learns."""
    chosen = implementation(target().platform, dtype, queries, keys, dim, dim_v, masked=masked)
    if chosen == "cudnn" and _exported.get():
        chosen = "xla"
    choice = Choice(tower, chosen, queries, keys, jnp.dtype(dtype).name)
    found = _choices.get()
    if found is not None and choice not in found:
        found.append(choice)
    return chosen


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
    tower: str,
    axes: tuple[str | None, str | None, str | None] = (None, None, None),
    causal: bool = False,
    key_valid: Bool[Array, "batch keys"] | None = None,
) -> Float[Array, "batch queries heads dim_v"]:
    """Scaled dot-product attention with the softmax in float32; the scale is dim ** -0.5.

    Query head h reads key-value head h * kv_heads // heads. A query that sees no key at all gets something
    finite.

    Equals torch.nn.functional.scaled_dot_product_attention on (batch, heads, tokens, dim) tensors.

    Args:
        q: queries.
        k: keys.
        v: values.
        tower: the part of the model that asks, for `recorded_choices`.
        axes: the meanings of the queries' first three axes (see `constrain`): a kernel runs on every device
            for its share of them.
        causal: query i sees keys 0..i.
        key_valid: False hides a key.
    """
    layout = layout_in_force()
    tokens_divided = layout is not None and layout.activation(q.shape, (*axes, None))[1] is not None
    masked = key_valid is not None or (causal and tokens_divided)
    sizes = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    chosen = choose(tower, q.dtype, *sizes, masked=masked)
    if chosen == "splash":
        return splash_attention(q, k, v, causal=causal, key_valid=key_valid, layout=layout, axes=axes)
    if chosen == "cudnn":
        return cudnn_attention(q, k, v, causal=causal, layout=layout, axes=axes)
    return xla_attention(q, k, v, causal=causal, key_valid=key_valid)


def cudnn_attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    *,
    causal: bool,
    layout: Layout | None,
    axes: tuple[str | None, str | None, str | None],
) -> Float[Array, "batch queries heads dim"]:
    """`attention` by cuDNN; JAX raises RuntimeError where it has none to compile for."""
    run = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    if layout is None:
        return run(q, k, v)
    first, second, third, _ = layout.activation(q.shape, (*axes, None))
    if layout.activation(k.shape, (axes[0], None, axes[2], None))[2] != third:
        # Then every device has the keys of its own queries' heads.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    of_queries, of_keys = (PartitionSpec(first, tokens, third, None) for tokens in (second, None))
    specs = (of_queries, of_keys, of_keys)
    return jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=of_queries, check_vma=False)(
        q, k, v
    )


def xla_attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim_v"],
    *,
    causal: bool = False,
    key_valid: Bool[Array, "batch keys"] | None = None,
) -> Float[Array, "batch queries heads dim_v"]:
    """`attention` on any device. A query that sees no key gets the mean of the values.

    Queries are taken in chunks when there are so many scores that memory matters; the backward pass then
    computes a chunk's scores again.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # Queries before the heads that share their keys: devices may each hold some of the queries.
    q = q.reshape(batch, queries, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    k, v = (row_major(x.swapaxes(1, 2)) for x in (k, v))

    def attend(q, rows):
        """The queries with these row numbers, as (batch, kv_heads, rows, group, dim)."""
        visible = []
        if causal:
            visible.append((jnp.arange(keys) <= rows[:, None])[None, None, :, None])
        if key_valid is not None:
            visible.append(key_valid[:, None, None, None])
        folded = row_major(q.reshape(batch, kv_heads, -1, dim))
        scores = einsum("bgqd,bgkd->bgqk", folded, k) * dim**-0.5
        if visible:  # added, because a select would break XLA's fused kernel on a CPU
            bias = jnp.where(functools.reduce(jnp.logical_and, visible), 0, MASKED)
            bias = jnp.broadcast_to(bias, (*bias.shape[:2], len(rows), group, keys))
            scores = scores + bias.reshape(*bias.shape[:2], -1, keys)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = einsum("bgqk,bgkd->bgqd", weights, v)
        return out.astype(v.dtype).reshape(*q.shape[:-1], v.shape[-1])

    size = chunk_size(batch, queries, heads * keys)
    if size >= queries:
        out = attend(q, jnp.arange(queries))
    else:
        chunks = -(-queries // size)

        def cut(x, axis):
            """Deal the query axis out to chunks that lead; zeros fill it up."""
            filled = jnp.pad(x, [(0, chunks * size - queries if i == axis else 0) for i in range(x.ndim)])
            dealt = filled.reshape(*x.shape[:axis], size, chunks, *x.shape[axis + 1 :])
            return jnp.moveaxis(dealt, axis + 1, 0)

        cuts = (cut(q, 2), cut(jnp.arange(queries), 0))
        out = jax.lax.map(jax.checkpoint(lambda args: attend(*args)), cuts)
        out = jnp.moveaxis(out, 0, 3).reshape(*q.shape[:2], chunks * size, group, -1)[:, :, :queries]
    return row_major(out.transpose(0, 2, 1, 3, 4)).reshape(batch, queries, heads, -1)


def chunk_size(batch: int, queries: int, scores: int) -> int:
    """How many queries of a row to take at a time, when one of them has so many scores.

    On a CPU the rows of a batch are worked off one after the other, and chunks are as equal as can be.
    Elsewhere all rows of a device are held, and chunks are multiples of 128, as the units multiply.
    """
    kind, devices = target()
    if kind in (None, "cpu"):
        chunks = -(-queries // max(1, MAX_SCORES // scores))
        return -(-queries // chunks)
    rows = -(-batch // devices) if isinstance(batch, int) else 1  # of an export that takes any number
    return min(queries, max(128, MAX_SCORES // (rows * scores) // 128 * 128))


def decode_attention(
    q: Float[Array, "batch heads dim"],
    keys: Float[Array, "batch kv_heads slots dim"],
    values: Float[Array, "batch kv_heads slots dim"],
    visible: Bool[Array, "batch slots"],
) -> Float[Array, "batch heads dim"]:
    """`attention` of a single query a row over a cache, of which it sees the `visible` slots.

    The operands are in the order that lets both products read the cache as it lies in memory.
    """
    batch, kv_heads, slots, dim = keys.shape
    choose("language", q.dtype, 1, slots, dim, dim)
    grouped = q.reshape(batch, kv_heads, -1, dim)
    batched = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(
        keys,
        grouped,
        (((3,), (3,)), batched),
        preferred_element_type=jnp.float32,
        precision=one_pass(q),
    )  # (batch, kv_heads, slots, group)
    scores = jnp.where(visible[:, None, :, None], scores * dim**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=2).astype(values.dtype)
    out = jax.lax.dot_general(
        weights,
        values,
        (((2,), (2,)), batched),
        preferred_element_type=jnp.float32,
        precision=one_pass(weights),
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
    scores = einsum("qd,kd->qk", q, keys) * q.shape[-1] ** -0.5
    if valid is not None:
        scores = jnp.where(valid, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(-1, keepdims=True))
    shrink, weights = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum)
    added = einsum("qk,kd->qd", weights.astype(values.dtype), values)
    return new_maximum, total * shrink + weights.sum(-1, keepdims=True), mixed * shrink + added
