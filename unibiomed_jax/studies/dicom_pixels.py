"""Pixels of DICOM frames as modality values: decoded, rescaled frame by frame, not inverted, not windowed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.studies.dicom_files import EXTRA, Frame, quietly
from unibiomed_jax.studies.windows import Window, own_window

if TYPE_CHECKING:
    from pydicom import Dataset


def read_values(frames: Sequence[Frame], name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Modality values of frames of one size and kind.

    Args:
        frames: in any order.
        name: of the series, for messages.

    Returns:
        (frames, rows, columns) float32, or (frames, rows, columns, 3) uint8 of colour images; and, if the
        object marks padding, (frames, rows, columns) true where there is some.

    Raises:
        InputError: a codec is missing, pixels are truncated or damaged.
    """
    values: np.ndarray | None = None
    padding: np.ndarray | None = None
    order = sorted(range(len(frames)), key=lambda i: (frames[i].file.place.path, frames[i].number))
    for _, group in groupby(order, key=lambda i: frames[i].file.place.path):
        members = list(group)
        stored = _decode([frames[i] for i in members], name)
        for i in members:
            pixels, header = next(stored)
            if header.PhotometricInterpretation == "PALETTE COLOR":
                found, padded = _palette_colours(pixels, header), None
            elif pixels.ndim == 3:
                found, padded = _colours(pixels, header), None
            else:
                found, padded = _rescale(pixels, header, frames[i]), _padding(pixels, header)
            if values is None:
                values = np.empty((len(frames), *found.shape), found.dtype)
            if found.shape != values.shape[1:]:
                raise InputError(
                    f"{name}: {frames[i]} has another size than its header says; export it again."
                )
            values[i] = found
            if padded is not None and padded.any():
                if padding is None:
                    padding = np.zeros((len(frames), *padded.shape), bool)
                padding[i] = padded
    assert values is not None
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise InputError(f"{name} holds values that are not finite; export it again from the archive.")
    return values, padding


def own_windows(frame: Frame) -> tuple[Window, ...]:
    """The windows that a frame brings, tables after lines; impossible ones are left out."""
    with quietly():
        found = frame.file.group("FrameVOILUTSequence", frame.number) if frame.file.is_enhanced else None
        header = frame.file.header if found is None else found
        centres, widths = (_list(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
        function = str(header.get("VOILUTFunction") or "LINEAR")
        lines = [
            own_window(float(centre), float(width), function)
            for centre, width in zip(centres, widths, strict=False)
            if centre is not None and width is not None
        ]
        tables = [_voi_table(item) for item in header.get("VOILUTSequence") or ()]
    return tuple(window for window in (*lines, *tables) if window is not None)


def _decode(frames: list[Frame], name: str):
    """Stored values of frames of one file, (rows, columns) or (rows, columns, 3), each with the header."""
    from pydicom import dcmread
    from pydicom.pixels import iter_pixels

    file = frames[0].file
    try:
        with quietly():
            dataset = dcmread(file.place.path, force=True)
            if not any(f"{kind}PixelData" in dataset for kind in ("", "Float", "DoubleFloat")):
                raise InputError(f"{name} has no pixels; export the images from the archive with them.")
            if "TransferSyntaxUID" not in dataset.file_meta:  # a file without its meta group
                dataset.file_meta.TransferSyntaxUID = _guessed_syntax(dataset)
            for pixels in iter_pixels(dataset, indices=[frame.number for frame in frames]):
                yield pixels, dataset
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the decoders raise whatever they met
        raise InputError(_why_not_decoded(file.header, str(error), f"{name}, {frames[0]}")) from None


def _guessed_syntax(dataset: Dataset) -> str:
    implicit, little = dataset.original_encoding
    if not little:
        return "1.2.840.10008.1.2.2"
    return "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1"


def _why_not_decoded(header: Dataset, reason: str, name: str) -> str:
    syntax = header.file_meta.get("TransferSyntaxUID", "")
    if syntax == "1.2.840.10008.1.2.4.51" and int(header.get("BitsStored") or 0) > 8:
        return f"{name}: {syntax.name} of more than 8 bits has no free decoder; run `dcmdjpeg` on it first."
    if "missing dependencies" in reason:
        return f"{name}: {syntax.name} needs another decoder; install them with {EXTRA}."
    return f"{name} has truncated or damaged pixels; copy it again from the archive."


def _colours(pixels: np.ndarray, header: Dataset) -> np.ndarray:
    """Red, green and blue of 8 bits; pydicom has converted from other colour spaces."""
    bits = int(header.BitsStored)
    return (pixels >> (bits - 8) if bits > 8 else pixels).astype(np.uint8)


def _rescale(pixels: np.ndarray, header: Dataset, frame: Frame) -> np.ndarray:
    """Stored as modality values, by the frame's own scale."""
    from pydicom.pixels import apply_modality_lut

    if header.get("ModalityLUTSequence"):
        return apply_modality_lut(pixels, header).astype(np.float32)
    slope, intercept = (
        frame.file.attribute("PixelValueTransformationSequence", attribute, frame.number)
        for attribute in ("RescaleSlope", "RescaleIntercept")
    )
    values = pixels.astype(np.float32)
    return values * np.float32(1 if slope is None else slope) + np.float32(
        0 if intercept is None else intercept
    )


def _palette_colours(pixels: np.ndarray, header: Dataset) -> np.ndarray:
    """Indices (rows, columns) of a palette image as colours (rows, columns, 3) of 8 bits."""
    from pydicom.pixels import apply_color_lut

    colours = apply_color_lut(pixels, header)
    return (colours >> 8 if colours.dtype.itemsize == 2 else colours).astype(np.uint8)


def _padding(pixels: np.ndarray, header: Dataset) -> np.ndarray | None:
    """Where the stored values mean that nothing was measured, or None if the object does not say."""
    first = header.get("PixelPaddingValue")
    if not isinstance(first, int):
        return None
    last = header.get("PixelPaddingRangeLimit")
    ends = sorted(_signed(end, header) for end in (first, last if isinstance(last, int) else first))
    return (pixels >= ends[0]) & (pixels <= ends[1])


def _signed(value: int, header: Dataset) -> int:
    """Some write the padding of signed pixels as an unsigned number."""
    bits = int(header.BitsAllocated)
    return value - (1 << bits) if header.PixelRepresentation == 1 and value >= 1 << (bits - 1) else value


def _voi_table(item: Dataset) -> Window | None:
    if "LUTDescriptor" not in item or "LUTData" not in item:
        return None
    entries, first, bits = item.LUTDescriptor
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if bits <= 8 else np.dtype("<u2"))
    table = np.asarray(data, np.float32)
    entries = entries or 1 << 16
    if entries < 2 or len(table) < entries:
        return None
    table = table[:entries] / np.float32((1 << bits) - 1)
    return Window(float(first), float(first + entries - 1), "the file's own", table=np.clip(table, 0, 1))


def _list(value) -> list:
    if value is None or value == "":
        return []
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
