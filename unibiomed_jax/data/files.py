"""What file names and headers tell of a record before any pixel is decoded."""

import contextlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import ExifTags, Image

from unibiomed_jax.data.records import Record
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import in_bucket, locate, open_file, read_range, shown

# Bytes that the header of an image takes, and what describes it before.
_HEADER = 1 << 16


def check_files(records: Sequence[Record]) -> dict[str, tuple[int, int] | None]:
    """Look at every file's name and header, and at no pixel.

    A header that cannot be read is passed over; reading the sample reports it.

    Returns:
        (width, height) of every file's upright image, None where the header cannot be read.

    Raises:
        InputError: the first record whose image or mask file is missing, whose image has another size than
            its table or its first slice, or whose mask another one than its image.
    """
    _check_names(records)
    files = list(dict.fromkeys(path for record in records for path in _files(record)))
    chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
    with ThreadPoolExecutor(8) as pool:  # waits for the disk most of the time
        sizes = dict(itertools.chain.from_iterable(pool.map(_file_sizes, chunks)))
    for record in records:
        for frame, path in enumerate(record.images):
            if (size := sizes[path]) is None:
                continue
            require_table_size(record, path, size)
            if (first := sizes[record.images[0]]) is not None:
                require_slice_size(record, path, size, first)
            for mask in (frames[frame] for frames in record.masks):
                if mask and sizes[mask] is not None:
                    require_mask_size(record.name, mask, sizes[mask], size)
    return sizes


def require_table_size(record: Record, path: str, size: tuple[int, int]) -> None:
    """Raise InputError if the record's table gives another size than the upright image has."""
    if min(record.size) > 0 and size != record.size:
        raise InputError(
            f"{shown(path)} of {record.name} is {size[0]}x{size[1]} pixels (upright) but its table says "
            f"{record.size[0]}x{record.size[1]}; correct width and height in the table."
        )


def require_slice_size(record: Record, path: str, size: tuple[int, int], first: tuple[int, int]) -> None:
    """Raise InputError if a slice of a volume has another upright size than its first one."""
    if size != first:
        raise InputError(
            f"{shown(path)} of {record.name} is {size[0]}x{size[1]} pixels (upright) but "
            f"{shown(record.images[0])} {first[0]}x{first[1]}; resample all slices to one size."
        )


def require_mask_size(name: str, path: str, size: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise InputError if a mask of the record `name` has another size than its upright image."""
    if size != image:
        raise InputError(
            f"The mask {shown(path)} of {name} is {size[0]}x{size[1]} pixels but its image "
            f"{image[0]}x{image[1]}; resize the mask to the image."
        )


def _files(record: Record) -> Iterator[str]:
    yield from record.images
    yield from (file for frames in record.masks for file in frames if file)


def _check_names(records: Iterable[Record]) -> None:
    listings: dict[str, set[str]] = {}
    for record in records:
        for path in _files(record):
            folder, name = os.path.split(path)
            if folder not in listings:
                opened = locate(folder)
                listings[folder] = {path.name for path in opened.iterdir()} if opened.is_dir() else set()
            if name not in listings[folder]:
                raise InputError(
                    f"{record.name} needs the file {shown(path)}, which does not exist; add it or remove the "
                    "annotation."
                )


def _file_sizes(paths: Sequence[str]) -> list[tuple[str, tuple[int, int] | None]]:
    """(width, height) of files, from their headers, as images and masks are read: upright."""
    return [(path, _file_size(path)) for path in paths]


def _file_size(path: str) -> tuple[int, int] | None:
    try:
        return _read_size(path)
    except BucketError:
        raise
    except Exception:  # Pillow's plugins raise whatever their parser met
        return None


def _read_size(path: str) -> tuple[int, int]:
    if in_bucket(path):  # the beginning is enough for most formats
        with contextlib.suppress(Exception), Image.open(io.BytesIO(read_range(path, 0, _HEADER))) as image:
            return upright_size(image)
        with Image.open(open_file(path)) as image:
            return upright_size(image)
    with Image.open(path) as image:
        return upright_size(image)


def image_size(record: Record) -> tuple[int, int]:
    """(width, height) of the record's images, upright: from the table, else from the first file's header."""
    if min(record.size) > 0:
        return record.size
    try:
        return _read_size(record.images[0])
    except BucketError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parser met
        raise InputError(
            f"{shown(record.images[0])} of {record.name} cannot be read ({error}); replace the file or "
            "remove the annotation."
        ) from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened file after the EXIF rotation, without decoding its pixels."""
    # The base class's method: that of PNG decodes them. TIFF's size is the upright one already.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    turned = image.format != "TIFF" and orientation in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size
