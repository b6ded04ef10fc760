"""Image files and arrays as 8-bit RGB images, with a record of what was done to them."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.pixels import ImageRecord, ImageSource, Pixels, decode, show_size, to_rgb


def open_image(source: ImageSource) -> tuple[Image.Image, ImageRecord]:
    """Open a file, a Pillow image or an array as an 8-bit RGB image, with a record of what was done.

    - EXIF orientation is applied, so that the image stands as a viewer shows it.
    - White-is-zero (TIFF) is inverted, so that it is as light as a viewer shows it.
    - Palette, grey, CMYK and other 8-bit modes become RGB by Pillow's conversion; alpha is dropped, not
      blended. Colour profiles and gamma are not applied, as the reference did not: the record names them.
    - More than 8 bits a sample (16-bit PNG or TIFF, integer or float arrays): integers that all lie in
      0..255 are kept as they are; anything else is scaled linearly so that the image's own lowest value
      becomes 0 and its highest 255. The two values are in the record. (The reference clips at 255, which
      turns a 12-bit scan white, and the full range of the type would turn it black.) To fix a window
      instead, apply it and pass 8-bit values.

    Raises:
        InputError: missing, empty, truncated, not an image, several frames, zero-sized, too many pixels, of
            samples that would be misread, or of an unusable type.
    """
    pixels = decode(source)
    return _as_rgb(pixels, _value_range([pixels]))


def open_frames(sources: Sequence[ImageSource]) -> tuple[list[Image.Image], list[ImageRecord]]:
    """Open the slices of a volume or the frames of a video in order, with one scale of grey for all.

    As `open_image`, but frames of more than 8 bits share the lowest and highest value of the whole
    sequence, so that a tissue keeps its grey level from slice to slice.

    Raises:
        InputError: no frames, frames of different sizes, or any frame that `open_image` would refuse.
    """
    if isinstance(sources, str | bytes | os.PathLike | Image.Image) or not isinstance(sources, Iterable):
        raise InputError(
            f"A {type(sources).__name__} is no sequence of frames; give a list of images in their order."
        )
    decoded = [decode(source) for source in sources]
    value_range = _value_range(decoded)
    opened = [_as_rgb(pixels, value_range) for pixels in decoded]
    frames = [frame for frame, _ in opened]
    check_frames(frames)
    return frames, [record for _, record in opened]


def by_number(path: str | os.PathLike) -> list[tuple[int, str]]:
    """A key that sorts slice_2 before slice_10."""
    parts = re.split(r"(\d+)", os.fspath(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def check_frames(frames: Sequence[Image.Image]) -> None:
    """Raise InputError unless there is at least one frame and all have one size."""
    if not frames:
        raise InputError("The frame sequence is empty; give at least one frame.")
    for index, frame in enumerate(frames):
        if frame.size != frames[0].size:
            raise InputError(
                f"Frame {index} is {show_size(frame.size)} but frame 0 is {show_size(frames[0].size)}; "
                "resample all frames to one size."
            )


def _value_range(images: Sequence[Pixels]) -> tuple[float, float]:
    """What becomes 0 and 255 in the images of more than 8 bits: (0, 255) if nothing would be lost so."""
    deep = [_colours(pixels.values) for pixels in images if isinstance(pixels.values, np.ndarray)]
    if not deep:
        return 0.0, 255.0
    low, high = float(min(values.min() for values in deep)), float(max(values.max() for values in deep))
    integers = all(values.dtype.kind in "ui" for values in deep)
    return (0.0, 255.0) if integers and low >= 0 and high <= 255 else (low, high)


def _as_rgb(pixels: Pixels, value_range: tuple[float, float]) -> tuple[Image.Image, ImageRecord]:
    values, record = pixels.values, pixels.record
    if isinstance(values, Image.Image):
        image, step = to_rgb(values, record)
    else:
        image, step = _scale(_colours(values), record, value_range)
    return image, replace(record, steps=(*record.steps, step)) if step else record


def _colours(values: np.ndarray) -> np.ndarray:
    """Without the alpha channel."""
    return values[..., :3] if values.ndim == 3 else values


def _scale(
    pixels: np.ndarray, record: ImageRecord, value_range: tuple[float, float]
) -> tuple[Image.Image, str]:
    """Samples of more than 8 bits in RGB, and the step that this is."""
    low, high = value_range
    if value_range == (0.0, 255.0):
        step = f"{record.mode} values lie in 0..255 and were kept"
    else:
        step = f"{record.mode} values {low:g}..{high:g} scaled linearly to 0..255"
    span = (high - low) or 1.0  # a constant image becomes black
    scaled = np.rint((pixels.astype(np.float64) - low) * 255.0 / span).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB"), step
