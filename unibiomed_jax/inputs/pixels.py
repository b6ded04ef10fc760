"""Images as people give them (files, open files, Pillow images, arrays) to upright pixels."""

import io
import os
import threading
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import in_bucket, locate, shown
from unibiomed_jax.inputs.formats import (
    DEEP_MODES,
    Losses,
    losses,
    orientation_of,
    require_no_scan,
    require_readable,
    stored_values,
    unapplied_colours,
)
from unibiomed_jax.inputs.shards import StoredFile


class SupportsArray(Protocol):
    """An array of another library, such as JAX or PyTorch."""

    def __array__(self, *args, **kwargs) -> np.ndarray: ...


ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray | SupportsArray

# What the 8-bit modes lose on the way to RGB.
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

# Pillow reads an image's file when its pixels are first needed: one that two threads share would be read by
# both at once, from one place in one file.
_shared_image = threading.Lock()


@dataclass(frozen=True)
class ImageRecord:
    """What was read and what was done to it (all of it goes into the result's JSON)."""

    # Path (bytes of it that are no text as escapes), or how the image was given when it was not a file.
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


@dataclass(frozen=True)
class Pixels:
    """Upright pixels, not yet brought to a common form."""

    # An 8-bit Pillow image in its own mode, or an array (height, width) or (height, width, channels) if a
    # sample has more than 8 bits.
    values: Image.Image | np.ndarray
    record: ImageRecord
    losses: Losses


def decode(source: ImageSource) -> Pixels:
    """Read an image or a mask; what is done is in the record.

    Raises:
        InputError: missing, empty, truncated, not an image, several frames, zero-sized, too many pixels, of
            samples that Pillow would misread, or of an unusable type.
    """
    if isinstance(source, Image.Image):
        name = "Pillow image"
        with _shared_image:
            pixels = _decode_image(source, name)
    elif isinstance(source, StoredFile) or (isinstance(source, str | os.PathLike) and in_bucket(source)):
        name = shown(source)
        pixels = _decode_file(_require_content(_read(source), name), name)
    elif isinstance(source, str | os.PathLike):
        name = shown(source)
        pixels = _decode_file(_require_file(source), name)
    elif hasattr(source, "read"):
        name = getattr(source, "name", None)
        name = shown(name) if isinstance(name, str) else "open file"
        with _shared_image:
            image = _open(source, name)
            _require_one_picture(image, name)
            pixels = _decode_image(image, name)
    elif hasattr(source, "__array__"):
        name, pixels = "array", _decode_array(_as_array(source))
    else:
        raise InputError(
            f"A {type(source).__name__} is no image; give a path, an open file, a Pillow image or an array, "
            "and the slices of a volume to open_volume."
        )
    width, height = pixels.record.width, pixels.record.height
    if height == 0 or width == 0:
        raise InputError(
            f"{name} has no pixels ({show_size((width, height))}); give an image of at least 1x1."
        )
    return pixels


def to_rgb(image: Image.Image, record: ImageRecord) -> tuple[Image.Image, str | None]:
    """An 8-bit image of any mode in RGB, and the step that this is. Alpha is dropped, not blended."""
    step = None if image.mode == "RGB" else _RGB_STEPS.get(image.mode, f"{image.mode} converted to RGB")
    if image.mode not in ("P", "PA") and "transparency" in image.info:
        step = "; ".join(filter(None, ("transparent colour kept", step)))
    try:
        if image.mode in ("P", "PA"):  # transparency may hang on palette entries
            indices, colours = palette_of(image)
            if len(colours) and not colours.any() and indices.any():
                raise InputError(
                    f"{record.source} has a palette of nothing but black; convert it to RGB first."
                )
            image = image.convert("RGBA")
        elif image.mode == "La":
            image = image.convert("LA")
        return image.convert("RGB"), step
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{record.source} has the colour mode {record.mode}; convert it to RGB first."
        ) from error


def palette_of(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The indices (height, width) of a palette image and the colours (entries, 3) that they stand for."""
    colours = np.array(image.getpalette("RGB") or [], np.uint8)
    return np.asarray(image.getchannel(0)), colours.reshape(-1, 3)


def show_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"


def _require_file(source: str | os.PathLike) -> Path:
    path, name = Path(os.fsdecode(source)), shown(source)
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder; name the image file in it.")
        if not path.exists():
            raise InputError(f"{name} does not exist; check the path.")
        if not path.is_file():
            raise InputError(f"{name} is no ordinary file; save the image as one first.")
        if path.stat().st_size == 0:
            raise _empty(name)
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise InputError(f"{name} cannot be read ({error.strerror}); check the path.") from error
    return path


def _read(source: StoredFile | str | os.PathLike) -> bytes:
    if isinstance(source, StoredFile):
        return source.read_bytes()
    try:
        return locate(source).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{shown(source)} does not exist; check the path.") from None


def _require_content(data: bytes, name: str) -> BinaryIO:
    if not data:
        raise _empty(name)
    return io.BytesIO(data)


def _empty(name: str) -> InputError:
    return InputError(f"{name} is an empty file; copy it again from its source.")


def _open(file: Path | BinaryIO, name: str) -> Image.Image:
    """A file that Pillow recognises, of an allowed size; its pixels are not decoded yet."""
    try:
        require_no_scan(file, name)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name} has more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}; shrink or crop it first, "
            "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
        ) from error
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{name} may not be read by this user; change its permissions.") from error
    except Exception as error:  # Pillow's plugins raise whatever their parser met
        raise InputError(
            f"{name} is not an image that Pillow can read; convert it to PNG, JPEG or another TIFF first."
        ) from error


def _require_one_picture(image: Image.Image, name: str) -> None:
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # as above
        raise InputError(
            f"{name} is truncated or damaged ({error}); copy it again from its source."
        ) from error
    # MPO is a JPEG with extra views of the same picture; elsewhere further frames are further content.
    if frames > 1 and image.format != "MPO":
        raise InputError(
            f"{name} holds {frames} frames; save each as its own file and pass them as a sequence."
        )


def _decode_file(file: Path | BinaryIO, name: str) -> Pixels:
    """As `_decode_image`, for a file that nobody else reads; it is closed."""
    image = _open(file, name)
    try:
        _require_one_picture(image, name)
        pixels = _decode_image(image, name)
        if pixels.values is image and hasattr(image, "n_frames"):  # which may be open for a next picture
            pixels = replace(pixels, values=image.copy())
    except BaseException:
        image.close()
        raise
    if pixels.values is not image:
        image.close()
    return pixels


def _decode_image(image: Image.Image, name: str) -> Pixels:
    mode, file_format, steps = image.mode, image.format, []
    if 0 in image.size:  # before any operation that cannot take it
        return Pixels(image, ImageRecord(name, file_format, mode, *image.size, ()), "none")
    require_readable(image, name)
    try:
        lost = losses(image)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            steps.append(f"picture {image.tell() + 1} of {frames} in the file")
        if (colours := unapplied_colours(image)) is not None:
            steps.append(colours)
        orientation, turned = orientation_of(image), file_format == "TIFF"
        image.load()  # now, so that a damaged file is found before any model runs
        if not turned:
            orientation = image.getexif().get(_ORIENTATION_TAG)
        values, step = stored_values(image)
        if orientation in range(2, 9):
            steps.append(f"EXIF orientation {orientation} applied")
            if not turned:
                image = ImageOps.exif_transpose(image)
        if step is not None:
            steps.append(step)
        if values is None and mode in DEEP_MODES:
            values = np.asarray(image)
    except Exception as error:  # the decoders raise whatever they met
        raise InputError(
            f"{name} is truncated or damaged ({error}); copy it again from its source."
        ) from error
    if values is not None:
        _require_finite(values, name)
    record = ImageRecord(name, file_format, mode, *image.size, tuple(steps))
    return Pixels(image if values is None else values, record, lost)


def _as_array(source: np.ndarray | SupportsArray) -> np.ndarray:
    if isinstance(source, np.ma.MaskedArray):
        raise InputError("The image array is a masked one; fill it (`.filled(value)`) first.")
    try:
        return np.asarray(source)
    except Exception as error:  # whatever the other library raises, such as for an array on a GPU
        raise InputError(
            f"The {type(source).__name__} cannot be read as an array ({error}); make it a NumPy array first."
        ) from error


def _decode_array(array: np.ndarray) -> Pixels:
    """(H, W) or (H, W, 1 | 3 | 4) arrays of booleans, integers or floats."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"The image array has the shape {array.shape}; give (height, width) or (height, width, channels) "
            "with 1, 3 or 4 channels."
        )
    if array.dtype.kind not in "buif":
        raise InputError(f"The image array has the type {array.dtype}; give booleans, integers or floats.")
    height, width = array.shape[:2]
    mode = str(array.dtype)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint8 and array.size:
        image = Image.fromarray(np.ascontiguousarray(array))
        return Pixels(image, ImageRecord("array", None, mode, width, height, ()), "none")
    steps = {2: ("grey image copied to three channels",), 3: ()}[array.ndim]
    if array.shape[2:] == (4,):
        steps = ("alpha channel dropped",)
    _require_finite(array, "The image array")
    return Pixels(array, ImageRecord("array", None, mode, width, height, steps), "none")


def _require_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds values that are not finite; replace them before.")
