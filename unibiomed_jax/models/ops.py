"""Pure functions of the models that have no parameters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, UInt8

from unibiomed_jax.config import PIXEL_MEAN, PIXEL_STD

# A score that is masked out becomes this. Finite, so that a row without any valid key gives
# the mean of the values and not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Attention scores (float32) that one row of a batch holds at a time; 2**25 of them are 128 MiB.
MAX_SCORES = 2**25


def normalize_pixels(pixels: UInt8[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """RGB bytes to the float32 values that both image encoders read."""
    return (pixels.astype(jnp.float32) / 255 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * Phi(x) with the error function in float32, as torch.nn.GELU() (jax.nn.gelu defaults to tanh)."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


def row_major(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Make a transpose move memory on a CPU, where XLA's fused attention kernel needs it; a no-op elsewhere.

    Decided by the platform that is compiled for, which need not be the one that runs this. Also a no-op
    where several devices work together: jax 0.10 would gather an array on all of them to lay it out.
    """
    if jax.device_count() > 1:
        return x
    constrain = functools.partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
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
    q = q.reshape(batch, queries, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    k, v = (row_major(x.swapaxes(1, 2)) for x in (k, v))
    if mask is not None:
        mask = mask.reshape(batch, min(mask.shape[1], kv_heads), -1, queries, keys)

    def attend(q, rows, mask):
        """The queries with these row numbers, as (batch, kv_heads, group, rows, dim)."""
        visible = [] if mask is None else [mask]
        if causal:
            visible.append((jnp.arange(keys) <= rows[:, None])[None, None, None])
        if key_valid is not None:
            visible.append(key_valid[:, None, None, None])
        folded = row_major(q.reshape(batch, kv_heads, -1, dim))
        scores = jnp.einsum("bgqd,bgkd->bgqk", folded, k, preferred_element_type=jnp.float32) * dim**-0.5
        if visible:  # added, because a select would break XLA's fused kernel on a CPU
            bias = jnp.where(functools.reduce(jnp.logical_and, visible), 0, MASKED)
            bias = jnp.broadcast_to(bias, (*bias.shape[:2], group, len(rows), keys))
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
            """Split the query axis into chunks that lead; the last one is filled up with zeros."""
            filled = jnp.pad(x, [(0, chunks * size - queries if i == axis else 0) for i in range(x.ndim)])
            return jnp.moveaxis(filled.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)

        cuts = (cut(q, 3), cut(jnp.arange(queries), 0), None if mask is None else cut(mask, 3))
        out = jax.lax.map(jax.checkpoint(lambda args: attend(*args)), cuts)
        out = jnp.moveaxis(out, 0, 3).reshape(*q.shape[:3], chunks * size, -1)[..., :queries, :]
    return row_major(out.transpose(0, 3, 1, 2, 4)).reshape(batch, queries, heads, -1)


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


def rope_table(
    positions: Int[Array, "*batch tokens"], dim: int, theta: float
) -> tuple[Float[Array, "*batch tokens dim"], Float[Array, "*batch tokens dim"]]:
    """Cosine and sine of the rotary angles position * theta ** (-2i / dim), in float32, for `rotate_half`.

    Both halves of the last axis hold the same dim / 2 angles (Su et al. 2021, arXiv 2104.09864, in the
    half-split order of GPT-NeoX).
    """
    frequencies = (1 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "batch tokens heads dim"],
    cos: Float[Array, "batch tokens dim"],
    sin: Float[Array, "batch tokens dim"],
) -> Float[Array, "batch tokens heads dim"]:
    """Rotate the pairs (x[i], x[i + dim / 2]); the arithmetic is in the dtype of x, as in Qwen2."""
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """(size_out, size_in) weights of torch's bicubic interpolation along one axis.

    Cubic convolution with a = -0.75, half-pixel centres, clamped indices, no antialiasing:
    torch.nn.functional.interpolate(mode="bicubic", align_corners=False). jax.image.resize("cubic") differs
    (a = -0.5, weights renormalised at the border).
    """
    a = -0.75
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        distance = np.abs(centre - (base + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        index = np.clip(base + tap, 0, size_in - 1)
        np.add.at(matrix, (np.arange(size_out), index), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def resize_bicubic(
    x: Float[Array, "rows columns channels"], size: tuple[int, int]
) -> Float[Array, "rows2 columns2 channels"]:
    """Resize a table of positions as torch.nn.functional.interpolate(mode="bicubic", align_corners=False)."""
    if x.shape[:2] == size:
        return x
    rows, columns = (bicubic_matrix(n_in, n_out) for n_in, n_out in zip(x.shape[:2], size, strict=True))
    return jnp.einsum("Rr,Cc,rcd->RCd", rows, columns, x, precision="highest")


def resize_bilinear(
    x: Float[Array, "*batch rows columns channels"], size: tuple[int, int]
) -> Float[Array, "*batch rows2 columns2 channels"]:
    """Resize maps as torch.nn.functional.interpolate(mode="bilinear"), without antialiasing."""
    shape = (*x.shape[:-3], *size, x.shape[-1])
    return jax.image.resize(x, shape, method="linear", antialias=False, precision="highest")


@functools.lru_cache
def sine_position(size: tuple[int, int], dim: int) -> np.ndarray:
    """(rows, columns, dim) sine encoding of a grid: half the channels for the row, then half for the column.

    Positions are counted from 1 and normalised to (0, 2 pi]; sine and cosine alternate (DETR, arXiv
    2005.12872, as SAM2 uses it).
    """
    half = dim // 2
    frequencies = 10_000.0 ** (2 * (np.arange(half) // 2) / half)

    def encode(length: int) -> np.ndarray:
        angles = np.arange(1, length + 1)[:, None] / (length + 1e-6) * 2 * np.pi / frequencies
        return np.where(np.arange(half) % 2 == 0, np.sin(angles), np.cos(angles))

    rows, columns = (encode(length) for length in size)
    shape = (*size, half)
    rows, columns = np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)
    return np.concatenate([rows, columns], axis=-1).astype(np.float32)


@functools.lru_cache
def axial_rope_table(grid: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine, each (grid * grid, dim / 2), of two-dimensional rotary angles, for `apply_axial_rope`.

    The first half of the pairs turns with the column, the second half with the row, both with the
    frequencies 10000 ** (-4i / dim).
    """
    frequencies = 10_000.0 ** (-np.arange(0, dim, 4) / dim)
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = np.concatenate([column[:, None] * frequencies, row[:, None] * frequencies], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_axial_rope(x: Float[Array, "*batch tokens dim"], grid: int) -> Float[Array, "*batch tokens dim"]:
    """Rotate the pairs (x[2i], x[2i + 1]) of a row-major grid of tokens, in float32, as SAM2's memory."""
    cos, sin = axial_rope_table(grid, x.shape[-1])
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
