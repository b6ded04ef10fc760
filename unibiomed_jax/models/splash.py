"""Attention on a TPU: JAX's Pallas kernel "splash", which never holds a matrix of scores.

It sees blocks of queries and keys that are multiples of 128 long. What is shorter is filled up with keys that
no query sees; short windows lie several in a block, where each sees its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from unibiomed_jax.models.layers import KERNEL_OUTPUT
from unibiomed_jax.sharding.layout import Layout

# Rows of a register: every block is a multiple of it.
LANES = 128
# The longest block of queries or keys: its scores are 1 MiB of float32, beside which all else fits.
MAX_BLOCK = 512
# Keys of several windows that share a block; more would waste more products on pairs of windows.
MAX_PACK = 256
# Numbers of no window: of queries and of keys that fill a block up, or are not valid.
NO_QUERY, NO_KEY = -1, -2


def block_size(length: int) -> int:
    """The block that fills `length` rows up with the fewest others; the largest of such."""
    if length <= MAX_BLOCK:
        return -(-length // LANES) * LANES
    return min(range(MAX_BLOCK, LANES, -LANES), key=lambda block: -(-length // block) * block)


def splash_attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim_v"],
    *,
    causal: bool,
    key_valid: Bool[Array, "batch keys"] | None,
    layout: Layout | None,
    axes: tuple[str | None, str | None, str | None],
    interpret: bool = False,
) -> Float[Array, "batch queries heads dim_v"]:
    """`attention` by the kernel; bfloat16 is multiplied in one pass, float32 as float32.

    Args:
        q: queries; they are multiplied by dim ** -0.5 first, and rounded to their format.
        k: keys.
        v: values.
        causal: query i sees keys 0..i; there are as many keys as queries.
        key_valid: which keys may be seen.
        layout: of the devices that share the work.
        axes: what the layout knows of the queries' first three axes.
        interpret: run on any device, slowly.
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    spec, local = PartitionSpec(None, None, None, None), q.shape
    if layout is not None:
        spec = layout.activation(q.shape, (*axes, None))
        local = NamedSharding(layout.mesh, spec).shard_shape(q.shape)
    if k.shape[2] % (heads // local[2]):  # then every device has the keys of its own queries' heads
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))

    together = 1
    if not causal and key_valid is None:
        fitting = range(1, max(1, MAX_PACK // max(queries, keys)) + 1)
        together = max(count for count in fitting if local[0] % count == 0)
    rows, columns = together * queries, together * keys
    parts = queries // local[1]
    block_q, block_k = block_size(rows // parts), block_size(columns)
    rows_filled = -(-rows // (parts * block_q)) * parts * block_q
    columns_filled = -(-columns // block_k) * block_k

    def blocks(x, length):
        """(windows, tokens, heads, dim) to (packs, heads, length, dim)."""
        x = x.reshape(batch // together, -1, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    def numbers(tokens, length, nobody):
        """Which window of its pack a token belongs to, the same in all packs."""
        own = np.repeat(np.arange(together, dtype=np.int32), tokens)
        return jnp.asarray(np.pad(own, (0, length - len(own)), constant_values=nobody))

    segments = None
    if together > 1 or key_valid is not None or (columns < columns_filled and not causal):
        of_keys = numbers(keys, columns_filled, NO_KEY)
        if key_valid is not None:
            valid = jnp.pad(key_valid, ((0, 0), (0, columns_filled - columns)))
            of_keys = jnp.where(valid, of_keys, NO_KEY)
        segments = splash_kernel.SegmentIds(numbers(queries, rows_filled, NO_QUERY), of_keys)

    shape = (rows_filled, columns_filled)
    mask = splash_mask.CausalMask(shape, shard_count=parts) if causal else splash_mask.FullMask(shape)
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_kernel.BlockSizes(
            **dict.fromkeys(("block_q", "block_q_dq", "block_q_dkv"), block_q),
            **dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dq"), block_k),
            **dict.fromkeys(("block_kv_dkv", "block_kv_dkv_compute"), block_k),
        ),
        head_shards=heads // local[2],
        q_seq_shards=parts,
        residual_checkpoint_name=KERNEL_OUTPUT,
        interpret=interpret,
    )
    run = functools.partial(_run, tuple(kernel.kwargs.items()))
    scaled = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    operands = (
        _masks(kernel),
        blocks(scaled, rows_filled),
        blocks(k, columns_filled),
        blocks(v, columns_filled),
        segments,
    )
    if layout is not None:
        first, second, third, _ = spec
        of_queries, of_keys = (PartitionSpec(first, third, tokens, None) for tokens in (second, None))
        of_segments = None
        if segments is not None:
            rows_of_keys = PartitionSpec(first, None) if segments.kv.ndim == 2 else PartitionSpec(None)
            of_segments = splash_kernel.SegmentIds(PartitionSpec(second), rows_of_keys)
        of_masks = kernel.manual_sharding_spec(NamedSharding(layout.mesh, PartitionSpec(third, second)))
        run = jax.shard_map(
            run,
            mesh=layout.mesh,
            in_specs=(_masks(of_masks), of_queries, of_keys, of_keys, of_segments),
            out_specs=of_queries,
            check_vma=False,
        )
    out = run(*operands)
    return out.swapaxes(1, 2)[:, :rows].reshape(batch, queries, heads, -1)


def _masks(kernel):
    return kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info


def _call(options, masks, q, k, v, segments):
    """The kernel of every pack, as (packs, heads, tokens, dim).

    The kernel takes the precision in force; the compiler refuses bfloat16 at "highest".
    """
    kernel = splash_kernel.SplashAttentionKernel(*masks, **dict(options))
    of_packs = None
    if segments is not None:
        of_packs = splash_kernel.SegmentIds(None, 0 if segments.kv.ndim == 2 else None)
    with _precision(q):
        return jax.vmap(kernel, in_axes=(0, 0, 0, of_packs))(q, k, v, segments)


def _precision(x):
    return jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else "default")


def _forward(options, masks, q, k, v, segments):
    return jax.vjp(lambda q, k, v: _call(options, masks, q, k, v, segments), q, k, v)


def _backward(_, transposed, g):
    with _precision(g):  # the kernels of the way back are traced here
        return None, *transposed(g), None


_run = jax.custom_vjp(_call, nondiff_argnums=(0,))
_run.defvjp(_forward, _backward)
