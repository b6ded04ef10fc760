"""What a file's format says about its pixels beyond what Pillow makes of it.

Pillow reads some files in another sense than they are meant: white-is-zero as black-is-zero, signed numbers
as unsigned, bytes in the wrong order. Those are put right here, or refused by name.
"""

import io
import struct
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms

from unibiomed_jax.errors import InputError

# What compression did to the pixels: nothing, something, or (where the file does not say) perhaps something.
Losses = Literal["none", "some", "maybe"]

# Volumes of scanners, whose values need a window and a place.
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")

# Modes that hold more than 8 bits a sample.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

# TIFF tags.
_BITS, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _PLANAR = 258, 262, 266, 274, 284
_INKS, _EXTRA, _SAMPLE_FORMAT, _SUBSAMPLING, _REFERENCE = 332, 338, 339, 530, 532
_WHITE_IS_ZERO, _YCBCR = 0, 6
_UNSIGNED, _SIGNED = 1, 2
# The black and white of YCbCr that Pillow takes for granted.
_FULL_RANGE = (0, 255, 128, 255, 128, 255)

# What the file holds where Pillow's mode has another sign, by (mode, bits, sample format).
_OTHER_SIGN = {("L", 8, _SIGNED): np.int8, ("I", 32, _UNSIGNED): np.uint32}

_MISREAD_FORMATS = {"FITS": "scale and sign", "IM": "palette"}
# Bits a pixel of BMP files in the modes that Pillow makes of grey palettes.
_BMP_BITS = {"1": 1, "L": 8}

_LOSSY_FORMATS = ("JPEG", "MPO", "AVIF", "HEIF", "DDS")
_TIFF_LOSSES: dict[str, Losses] = {"jpeg": "some", "tiff_jpeg": "some", "webp": "maybe"}

# PNG's gamma of an sRGB image.
_SRGB_GAMMA = 0.45455


def require_no_scan(file: Path | BinaryIO, name: str) -> None:
    """Raise InputError for DICOM, which may look like a TIFF file, and for volumes.

    Raises:
        OSError: it cannot be read.
    """
    volume = name.lower().endswith(VOLUME_SUFFIXES)
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            start = opened.read(132)
    elif volume or not file.seekable():
        start = b""
    else:
        place = file.tell()
        start = file.read(132)
        file.seek(place)
    if volume or start[128:] == b"DICM":
        raise scan_refusal(name)


def scan_refusal(name: str) -> InputError:
    """The sentence for what a scanner made."""
    return InputError(
        f"{name} is DICOM or a volume, whose values need a window; ask about it with `unibiomed study` (in "
        "Python open_study and ask_study)."
    )


def require_readable(image: Image.Image, name: str) -> None:
    """Raise InputError for an opened image whose pixels Pillow would read as something else than they are."""
    if image.mode not in DEEP_MODES and _has_upper_bytes_alone(image):
        raise InputError(
            f"{name} has 16 bits a colour channel, of which only the upper 8 could be read; convert it to 8 "
            "bits first."
        )
    if image.format in _MISREAD_FORMATS:
        raise InputError(
            f"{name} is of the format {image.format}, whose {_MISREAD_FORMATS[image.format]} would be lost; "
            "convert it to PNG or TIFF first."
        )
    if image.format in ("BMP", "DIB") and _bmp_bits(image) not in (None, _BMP_BITS.get(image.mode)):
        raise InputError(
            f"{name} is a BMP file with a palette of {2 if image.mode == '1' else 16} greys that would be "
            "misread; save it as PNG first."
        )
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        raise InputError(
            f"{name} is a CMYK JPEG that does not say which end of its scale is ink; convert it to RGB first."
        )
    if image.format == "JPEG2000" and (header := _jpeg2000_header(image)):
        bits, signed, _ = header
        if signed or bits < 8:
            raise InputError(
                f"{name} is a JPEG 2000 file of {'signed' if signed else f'{bits}-bit'} samples, which would "
                "be read on another scale; convert it to PNG or TIFF first."
            )
    if image.format == "TIFF" and (reason := _misread_tiff(image)):
        raise InputError(
            f"{name} is a TIFF file {reason}, which cannot be read rightly; convert it to PNG first."
        )


def _has_upper_bytes_alone(image: Image.Image) -> bool:
    """Whether a sample has 16 bits in the file and 8 in Pillow."""
    for codec, _, _, arguments in getattr(image, "tile", ()):
        last = arguments[-1] if isinstance(arguments, tuple) and arguments else None
        if ";16" in str(arguments) or codec == "SGI16" or (codec == "sgi_rle" and last == 2):
            return True
        if codec.startswith("ppm") and isinstance(last, int) and last > 255:  # the brightest value
            return True
    if image.format == "JPEG2000" and (header := _jpeg2000_header(image)):
        return header[0] > 8
    return image.format == "TIFF" and max(_tags(image, _BITS)) > 8


def _misread_tiff(image: Image.Image) -> str | None:
    """In what a TIFF file is such that Pillow gives wrong pixels for it, or None."""
    tags, compressed = image.tag_v2, image.info["compression"] != "raw"
    photometric, bits = tags.get(_PHOTOMETRIC), _tags(image, _BITS)
    fill_order, extra = tags.get(_FILL_ORDER, 1), _tags(image, _EXTRA)
    if photometric is None:
        return "that does not say whether its zero is black or white (no PhotometricInterpretation)"
    if photometric == _WHITE_IS_ZERO and image.mode == "F":
        return "of floating numbers with white as zero, which leaves black undefined"
    if tags.prefix == b"MM" and compressed and image.mode in ("I", "F"):
        return "with signed or floating numbers in compressed big-endian order"
    if tags.get(_PLANAR) == 2:  # Pillow takes the first letters of the layout for those of its planes
        whole = set(bits) == {8} or (bits == (1,) and not compressed)
        if image.mode in ("La", "LA") or (
            not compressed and not (whole and fill_order == 1 and 1 not in extra)
        ):
            return "with its channels in separate planes of this kind"
        if photometric == _WHITE_IS_ZERO and not compressed:
            return "with white as zero in a plane of its own"
    if photometric == _YCBCR and not compressed:
        if _tags(image, _SUBSAMPLING) != (1, 1) or _tags(image, _REFERENCE) not in ((), _FULL_RANGE):
            return "of uncompressed YCbCr with shared or shortened colours"
    if tags.get(_INKS, 1) != 1:
        return "of other inks than CMYK"
    return None


def _tags(image: Image.Image, tag: int) -> tuple:
    value = image.tag_v2.get(tag, (1,) if tag == _BITS else ())
    return value if isinstance(value, tuple) else (value,)


def stored_values(image: Image.Image) -> tuple[np.ndarray | None, str | None]:
    """The samples of a loaded TIFF file where Pillow's are not what the file means, else None; and the step
    that is to be recorded. (White-is-zero of up to 8 bits Pillow itself inverts.)
    """
    if image.format != "TIFF":
        return None, None
    bits, sample_format = _tags(image, _BITS), (*_tags(image, _SAMPLE_FORMAT), _UNSIGNED)[0]
    values = None
    if (other := _OTHER_SIGN.get((image.mode, bits[0], sample_format))) is not None:
        values = np.asarray(image).view(other)
    if image.tag_v2.get(_PHOTOMETRIC) != _WHITE_IS_ZERO:
        return values, None
    if image.mode in DEEP_MODES:
        values = np.asarray(image) if values is None else values
        values = np.iinfo(values.dtype).max - values
    return values, "white-is-zero inverted"


def orientation_of(image: Image.Image) -> int | None:
    """The EXIF orientation that Pillow itself applies while it loads a TIFF file; None for all others."""
    return image.tag_v2.get(_ORIENTATION) if image.format == "TIFF" else None


def losses(image: Image.Image) -> Losses:
    """What compression did to the pixels of an opened image, by its format and not by its name."""
    if image.format == "TIFF":
        return _TIFF_LOSSES.get(image.info.get("compression"), "none")
    if image.format == "WEBP":
        return {b"VP8 ": "some", b"VP8L": "none"}.get(_webp_codec(image), "maybe")
    if image.format == "JPEG2000":
        header = _jpeg2000_header(image)
        return "some" if header and header[2] else "maybe"
    return "some" if image.format in _LOSSY_FORMATS else "none"


def unapplied_colours(image: Image.Image) -> str | None:
    """The step that says which colour profile or gamma of the file was not applied; None if there is none.

    Pixels are taken as they are stored: so did the reference, and so were the weights trained.
    """
    if profile := image.info.get("icc_profile"):
        try:
            described = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
        except Exception:  # of a damaged profile, or by a Pillow without LittleCMS
            described = ""
        return None if "sRGB" in described else f"colour profile {described or 'without a name'} not applied"
    gamma = image.info.get("gamma")
    if gamma and "srgb" not in image.info and abs(gamma - _SRGB_GAMMA) > 0.01:
        return f"gamma {gamma:g} not applied"
    return None


def _bmp_bits(image: Image.Image) -> int | None:
    """Bits a pixel of a BMP file with a grey palette; Pillow takes 8 bits for 1 where it has two entries."""
    if image.mode not in _BMP_BITS or not (data := _file_of(image)):
        return None
    start = 14 if data[:2] == b"BM" else 0
    (header,) = struct.unpack("<I", data[start : start + 4])
    place = start + (10 if header == 12 else 14)
    return struct.unpack("<H", data[place : place + 2])[0]


def _webp_codec(image: Image.Image) -> bytes:
    """The kind of the chunk that holds a WebP file's pixels; empty if the file cannot be looked at."""
    data = _file_of(image)
    place, codec = 12, data[12:16]
    while codec and codec not in (b"VP8 ", b"VP8L"):
        inside = 8 + 16 if codec == b"ANMF" else None  # an animation's frame holds chunks of its own
        (length,) = struct.unpack("<I", data[place + 4 : place + 8].ljust(4, b"\0"))
        place += inside or 8 + length + length % 2
        codec = data[place : place + 4]
    return codec


def _jpeg2000_header(image: Image.Image) -> tuple[int, bool, bool] | None:
    """Most bits a sample, whether any is signed, whether the transform is the lossy one; None if unknown."""
    data = _file_of(image)
    start = data.find(b"\xff\x4f\xff\x51")  # the beginning of the code stream, and its sizes
    if start < 0:
        return None
    channels = struct.unpack(">H", data[start + 40 : start + 42])[0]
    depths = data[start + 42 : start + 42 + 3 * channels : 3]
    place = start + 2
    while data[place : place + 2] not in (b"\xff\x52", b"\xff\x90", b""):  # coding style, or the first tile
        place += 2 + struct.unpack(">H", data[place + 2 : place + 4].ljust(2, b"\0"))[0]
    irreversible = data[place : place + 2] == b"\xff\x52" and data[place + 13 : place + 14] == b"\0"
    bits = max((depth % 128 + 1 for depth in depths), default=8)
    return bits, any(depth >= 128 for depth in depths), irreversible


def _file_of(image: Image.Image) -> bytes:
    """The bytes of the file that an image was opened from, as far as it is still open."""
    file = getattr(image, "fp", None)
    if file is None or getattr(file, "closed", False):
        return b""
    place = file.tell()
    file.seek(0)
    try:
        return file.read()
    finally:
        file.seek(place)
