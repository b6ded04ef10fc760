"""Safetensors files written tensor by tensor, so that a checkpoint never has to fit in memory."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from unibiomed_jax.conversion.reading import DTYPE_NAMES, DTYPES, INDEX
from unibiomed_jax.conversion.rows import contiguous
from unibiomed_jax.errors import InputError

# A checkpoint larger than this is cut into shards.
SHARD_BYTES = 5_000_000_000
# What a direct transfer has to be a multiple of on all usual disks; a page at least, so that no page of the
# cache is also written directly.
BLOCK = max(4096, mmap.PAGESIZE)
# How much goes at a time.
BUFFER_BYTES = 8 << 20
# Some systems refuse to write more than 2 GiB in one call.
CALL_BYTES = 1 << 30


def write_safetensors(
    folder: Path,
    plan: dict[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    file_name: str = "model.safetensors",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as one safetensors file, or as numbered shards with an index.

    Args:
        folder: where the files go.
        plan: dtype and shape of every tensor.
        tensors: the contents, in any order, each exactly once.
        file_name: the single file's name.
        shard_bytes: size above which a new shard begins.

    Raises:
        InputError: `tensors` does not deliver exactly what `plan` says.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    # The order of the safetensors library: wide numbers first, so that every tensor is aligned, then by name.
    order = list(DTYPES.values())
    for name, spec in sorted(plan.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        if shards[-1] and filled + _size(spec) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(spec)
    stem = Path(file_name).stem
    names = [file_name]
    if len(shards) > 1:
        names = [f"{stem}-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
        _write_index(folder, plan, dict(zip(names, shards, strict=True)))

    places = {}
    for file, shard in zip(names, shards, strict=True):
        start = _write_header(folder / file, {name: plan[name] for name in shard})
        for name in shard:
            places[name] = (folder / file, start)
            start += _size(plan[name])
    with contextlib.ExitStack() as stack:
        paths = {path for path, _ in places.values()}
        files = {path: stack.enter_context(contextlib.closing(DirectFile(path))) for path in paths}
        for name, values in tensors:
            path, offset = places.pop(name, (None, 0))
            dtype, shape = plan[name] if path else (None, None)
            if path is None or values.dtype != dtype or values.shape != shape:
                raise InputError(
                    f"{name} is written twice, or not with the number format and shape announced."
                )
            try:
                files[path].write(contiguous(values).reshape(-1).view(np.uint8), offset)
            except OSError as error:
                error.filename = error.filename or str(path)  # a write does not say to which file
                raise
    if places:
        raise InputError(f"{next(iter(places))} was announced but never written.")


class DirectFile:
    """An existing file, written at any place, as far as possible straight from memory to the disk.

    Through the page cache a large checkpoint may take several times as long as the disk needs, and pushes
    out of memory what others use. Only what is no whole block goes through it, and everything where the
    system cannot do without.
    """

    def __init__(self, path: Path):
        # Its start is that of a page of memory, as direct transfers demand.
        self.buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)
        self.cached = os.open(path, os.O_WRONLY)
        try:
            self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except (AttributeError, OSError):  # an operating system or a file system without it
            self.direct = None

    def write(self, data: UInt8[np.ndarray, " bytes"], offset: int) -> None:
        first, last = -(-offset // BLOCK) * BLOCK - offset, (offset + len(data)) // BLOCK * BLOCK - offset
        if self.direct is None or first >= last:
            _write_all(self.cached, data, offset)
            return
        _write_all(self.cached, data[:first], offset)
        for start in range(first, last, BUFFER_BYTES):
            chunk = self.buffer[: min(BUFFER_BYTES, last - start)]
            chunk[:] = data[start : start + len(chunk)]
            try:
                written = os.pwrite(self.direct, chunk.data, offset + start)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                written = 0  # larger blocks, or none at all
            _write_all(self.cached, chunk[written:], offset + start + written)
        _write_all(self.cached, data[last:], offset + last)

    def close(self) -> None:
        try:
            os.close(self.cached)
        finally:
            if self.direct is not None:
                os.close(self.direct)


def _write_all(file: int, data: np.ndarray, offset: int) -> None:
    while len(data):
        written = os.pwrite(file, data[:CALL_BYTES].data, offset)
        data, offset = data[written:], offset + written


def _size(spec: tuple[np.dtype, tuple[int, ...]]) -> int:
    return spec[0].itemsize * math.prod(spec[1])


def _write_header(path: Path, plan: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> int:
    """Write the header of a file that holds the tensors of `plan` in this order; return where they start."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in plan.items():
        end = position + _size(spec)
        header[name] = {"dtype": DTYPE_NAMES[spec[0]], "shape": spec[1], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return 8 + len(text)


def _write_index(folder: Path, plan: dict, shards: dict[str, list[str]]) -> None:
    index = {
        "metadata": {"total_size": sum(_size(spec) for spec in plan.values())},
        "weight_map": {name: file for file, names in sorted(shards.items()) for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
