"""Masks and their logits at other sizes."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image


def upscale_masks(
    logits: Float[np.ndarray, "*batch rows columns"], size: tuple[int, int], image_size: int
) -> Float32[np.ndarray, "*batch height width"]:
    """Mask logits of the decoder at `size` = (height, width), pixels.

    In two steps, as the reference: first to SAM2's `image_size`, then to the image's. A single step would
    move borders.
    """
    return resize_logits(resize_logits(logits, (image_size, image_size)), size)


def resize_logits(
    x: Float[np.ndarray, "*batch rows columns"], size: tuple[int, int]
) -> Float32[np.ndarray, "*batch height width"]:
    """torch.nn.functional.interpolate(mode="bilinear", align_corners=False) of the last two axes, in float32.

    The axis that shrinks most is resized first, to keep the intermediate small.
    """
    x = np.asarray(x, np.float32)
    for axis in sorted((-2, -1), key=lambda axis: size[axis] / x.shape[axis]):
        x = _resize_axis(x, axis, size[axis])
    return x


def _resize_axis(x: np.ndarray, axis: int, length: int) -> np.ndarray:
    if x.shape[axis] == length:
        return x
    low, high, weight = _taps(x.shape[axis], length)
    weight = weight.reshape(-1, *[1] * (-1 - axis))
    result = np.take(x, high, axis)
    below = np.take(x, low, axis)
    result -= below
    result *= weight
    result += below
    return result


@functools.lru_cache(maxsize=64)
def _taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every output cell the two cells it lies between, and how near it is to the second one.

    The scale and the centres (by one fused multiply-add) are rounded to float32 because torch does so; in
    float64 results would be 1e-5 apart.
    """
    scale = np.float64(np.float32(size_in) / np.float32(size_out))
    centre = np.maximum((np.arange(size_out) + 0.5) * scale - 0.5, 0).astype(np.float32)
    low = np.minimum(centre.astype(np.intp), size_in - 1)
    return low, np.minimum(low + 1, size_in - 1), centre - low.astype(np.float32)


def resize_mask(mask: np.ndarray, size: tuple[int, int], cover: float = 0.5) -> np.ndarray:
    """Boolean (H, W) mask at `size` = (width, height): a pixel is inside from `cover` of its area on.

    Half the area leaves the area of compact targets as it is; thin ones (vessels) need less to stay
    connected.
    """
    if mask.shape == size[::-1]:
        return mask
    share = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return np.asarray(share) >= cover * 255


def resize_nearest(
    masks: Bool[np.ndarray, "*batch height width"], side: int
) -> UInt8[np.ndarray, "*batch side side"]:
    """0/1 bytes as torch's interpolate(mode="nearest"): row i reads row floor(i * float32(height / side))."""
    rows, columns = (
        (np.arange(side, dtype=np.float32) * np.float32(length / side)).astype(np.int64)
        for length in masks.shape[-2:]
    )
    return masks[..., rows[:, None], columns].astype(np.uint8)
