"""Pure functions of the models that have no parameters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from unibiomed_jax.config.model import PIXEL_MEAN, PIXEL_STD

# The value of every byte (rows) in every channel: as torchvision's ToTensor and Normalize, to the bit.
_NORMALISED = (
    np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - np.float32(PIXEL_MEAN)
) / np.float32(PIXEL_STD)


def normalize(
    pixels: UInt8[Array, "*batch 3"] | Float[Array, "*batch 3"],
) -> Float[Array, "*batch 3"]:
    """RGB bytes to the float32 values that both image encoders read; floats are taken as normalised already.

    On a CPU the values are looked up, which is exact; elsewhere they are computed, to within a rounding (a
    compiler multiplies by 1 / 255).
    """
    if pixels.dtype != jnp.uint8:
        return jnp.asarray(pixels)

    def look_up(pixels):
        return jnp.asarray(_NORMALISED)[pixels.astype(jnp.int32), jnp.arange(3)]

    return jax.lax.platform_dependent(jnp.asarray(pixels), cpu=look_up, default=normalize_fused)


def normalize_fused(
    pixels: UInt8[Array, "*batch 3"] | Float[Array, "*batch 3"],
) -> Float[Array, "*batch 3"]:
    """As `normalize`, computed on every device: fused into what reads the pixels, for many frames or tiles.

    Up to a rounding from the table of a CPU, which is why one picture is looked up: its numbers are the
    reference's to the bit.
    """
    if pixels.dtype != jnp.uint8:
        return jnp.asarray(pixels)
    return (pixels.astype(jnp.float32) / 255 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * Phi(x) with the error function in float32, as torch.nn.GELU() (jax.nn.gelu defaults to tanh)."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


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
