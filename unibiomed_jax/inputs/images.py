"""Image files and arrays as 8-bit RGB images, with a record of what was done to them."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps

from unibiomed_jax.errors import InputError

ImageSource = str | os.PathLike | Image.Image | np.ndarray

# Endings of the files that are taken for images where a folder is given.
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}

# Modes that hold more than 8 bits a sample, and what the 8-bit ones lose on the way to RGB.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

_RGB_STEPS = {
    "1": "bilevel image converted to RGB",
    "L": "grey image copied to three channels",
    "P": "palette image converted to RGB",
    "LA": "alpha channel dropped; grey image copied to three channels",
    "PA": "palette image converted to RGB; alpha channel dropped",
    "La": "alpha channel dropped; grey image copied to three channels",
    "RGBA": "alpha channel dropped",
    "RGBa": "alpha channel dropped",
    "CMYK": "CMYK converted to RGB without a colour profile",
}

_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class ImageRecord:
    """What was read and what was done to it (all of it goes into the result's JSON)."""

    # Path, or how the image was given when it was not a file.
    source: str
    # File format as Pillow names it, or None for an image given in memory.
    format: str | None
    # Pillow mode, or NumPy dtype, before conversion.
    mode: str
    # Size in pixels after the EXIF rotation: masks and boxes refer to this frame.
    width: int
    height: int
    # Conversions and resizes in the order they were made, a phrase each.
    steps: tuple[str, ...]


def open_image(source: ImageSource) -> tuple[Image.Image, ImageRecord]:
    """Open a file, a Pillow image or an array as an 8-bit RGB image, with a record of what was done.

    - EXIF orientation is applied, so that the image stands as a viewer shows it.
    - Palette, grey, CMYK and other 8-bit modes become RGB by Pillow's conversion; alpha is dropped, not
      blended.
    - More than 8 bits a sample (16-bit PNG or TIFF, integer or float arrays): integers that all lie in
      0..255 are kept as they are; anything else is scaled linearly so that the image's own lowest value
      becomes 0 and its highest 255. The two values are in the record. (The reference clips at 255, which
      turns a 12-bit scan white, and the full range of the type would turn it black.) To fix a window
      instead, apply it and pass 8-bit values.

    Raises:
        InputError: missing, empty, truncated, not an image, several frames, zero-sized, too many pixels,
            or of an unusable type.
    """
    pixels, record = _decode(source)
    return _as_rgb(pixels, record, _value_range([pixels]))


def open_frames(sources: Sequence[ImageSource]) -> tuple[list[Image.Image], list[ImageRecord]]:
    """Open the slices of a volume or the frames of a video in order, with one scale of grey for all.

    As `open_image`, but frames of more than 8 bits share the lowest and highest value of the whole
    sequence, so that a tissue keeps its grey level from slice to slice.

    Raises:
        InputError: no frames, frames of different sizes, or any frame that `open_image` would refuse.
    """
    decoded = [_decode(source) for source in sources]
    value_range = _value_range([pixels for pixels, _ in decoded])
    opened = [_as_rgb(pixels, record, value_range) for pixels, record in decoded]
    frames = [frame for frame, _ in opened]
    check_frames(frames)
    return frames, [record for _, record in opened]


def open_mask(source: ImageSource) -> Bool[np.ndarray, "height width"]:
    """A mask image as booleans: True where it is not 0, whatever the other values are.

    A palette image is judged by its indices and not by their colours, a colour image by any of its channels;
    alpha does not count.

    Raises:
        InputError: whatever `open_image` would refuse.
    """
    pixels, record = _decode(source)
    if isinstance(pixels, Image.Image):
        indexed = record.mode in ("P", "PA")
        pixels = np.asarray(pixels.getchannel(0) if indexed else _convert(pixels, record)[0])
    return (pixels != 0).reshape(record.height, record.width, -1).any(axis=-1)


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
                f"Frame {index} is {_size(frame.size)} but frame 0 is {_size(frames[0].size)}; "
                "resample all frames to one size."
            )


def _decode(source: ImageSource) -> tuple[Image.Image | np.ndarray, ImageRecord]:
    """Upright pixels: an 8-bit Pillow image in its own mode, or an array if a sample has more than 8 bits."""
    if isinstance(source, np.ndarray):
        name, file_format, pixels, mode, steps = "array", None, *_check_array(source)
    else:
        in_memory = isinstance(source, Image.Image)
        name = "Pillow image" if in_memory else os.fspath(source)
        image = source if in_memory else _read_file(Path(source))
        file_format = image.format
        pixels, mode, steps = _upright(image, name)
    height, width = pixels.shape[:2] if isinstance(pixels, np.ndarray) else pixels.size[::-1]
    if height == 0 or width == 0:
        raise InputError(f"{name} has no pixels ({_size((width, height))}); give an image of at least 1x1.")
    return pixels, ImageRecord(name, file_format, mode, width, height, steps)


def _read_file(path: Path) -> Image.Image:
    """A file that Pillow recognises, of an allowed size; its pixels are not decoded yet."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the image file in it.")
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is an empty file; copy it again from its source.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            frames = getattr(image, "n_frames", 1)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} has more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}; shrink or crop it first, "
            "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
        ) from error
    except PermissionError as error:
        raise InputError(f"{path} may not be read by this user; change its permissions.") from error
    except Exception as error:  # Pillow's plugins raise whatever their parser met
        raise InputError(
            f"{path} is not an image that Pillow can read; convert it to PNG, JPEG or TIFF first."
        ) from error
    # MPO is a JPEG with extra views of the same picture; elsewhere further frames are further content.
    if frames > 1 and image.format != "MPO":
        raise InputError(
            f"{path} holds {frames} frames; save each as its own file and pass them as a sequence."
        )
    return image


def _upright(image: Image.Image, name: str) -> tuple[Image.Image | np.ndarray, str, tuple[str, ...]]:
    """Pixels after the EXIF rotation, the original mode, and the steps so far."""
    mode, steps = image.mode, []
    if 0 in image.size:  # before any operation that cannot take it
        return image, mode, ()
    if mode not in _DEEP_MODES and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        raise InputError(
            f"{name} has 16 bits a colour channel, of which only the upper 8 could be read; convert it to 8 "
            "bits first."
        )
    try:
        image.load()  # now, so that a damaged file is found before any model runs
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        if orientation in range(2, 9):
            image = ImageOps.exif_transpose(image)
            steps.append(f"EXIF orientation {orientation} applied")
    except Exception as error:  # the decoders raise whatever they met
        raise InputError(
            f"{name} is truncated or damaged ({error}); copy it again from its source."
        ) from error
    deep = mode in _DEEP_MODES
    return _check_finite(np.asarray(image), name) if deep else image, mode, tuple(steps)


def _check_array(array: np.ndarray) -> tuple[Image.Image | np.ndarray, str, tuple[str, ...]]:
    """As `_upright`, for (H, W) or (H, W, 1 | 3 | 4) arrays of booleans, integers or floats."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"The image array has the shape {array.shape}; give (height, width) or (height, width, channels) "
            "with 1, 3 or 4 channels."
        )
    if array.dtype.kind not in "buif":
        raise InputError(f"The image array has the type {array.dtype}; give booleans, integers or floats.")
    mode, steps = str(array.dtype), ()
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        steps = ("grey image copied to three channels",)
    elif array.shape[2] == 4:
        array, steps = array[..., :3], ("alpha channel dropped",)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint8 and array.size:
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB"), mode, steps
    return _check_finite(array, "The image array"), mode, steps


def _check_finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds values that are not finite; replace them before.")
    return values


def _value_range(images: Sequence[Image.Image | np.ndarray]) -> tuple[float, float]:
    """What becomes 0 and 255 in the images of more than 8 bits: (0, 255) if nothing would be lost so."""
    deep = [pixels for pixels in images if isinstance(pixels, np.ndarray)]
    if not deep:
        return 0.0, 255.0
    low, high = float(min(pixels.min() for pixels in deep)), float(max(pixels.max() for pixels in deep))
    integers = all(pixels.dtype.kind in "ui" for pixels in deep)
    return (0.0, 255.0) if integers and low >= 0 and high <= 255 else (low, high)


def _as_rgb(
    pixels: Image.Image | np.ndarray, record: ImageRecord, value_range: tuple[float, float]
) -> tuple[Image.Image, ImageRecord]:
    if isinstance(pixels, Image.Image):
        image, step = _convert(pixels, record)
    else:
        image, step = _scale(pixels, record, value_range)
    return image, replace(record, steps=(*record.steps, step)) if step else record


def _convert(image: Image.Image, record: ImageRecord) -> tuple[Image.Image, str | None]:
    """An 8-bit image of any mode in RGB, and the step that this is."""
    step = None if image.mode == "RGB" else _RGB_STEPS.get(image.mode, f"{image.mode} converted to RGB")
    try:
        if image.mode in ("P", "PA"):  # transparency may hang on palette entries
            image = image.convert("RGBA")
        return image.convert("RGB"), step
    except ValueError as error:
        raise InputError(
            f"{record.source} has the colour mode {record.mode}; convert it to RGB first."
        ) from error


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


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"
