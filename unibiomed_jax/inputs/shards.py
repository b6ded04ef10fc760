"""Files in ArrayRecord shards: written one after the other, each read by the range where its bytes lie.

An ArrayRecord is a Riegeli file. With one record a group and nothing compressed, as written here, every
record is a chunk: a header, then data that end with the record's bytes. Every 64 KiB a block header lies in
between. Knowing where a record begins, one read of a range gives it, from any storage that can read ranges:
no footer, no open reader, no lock.
"""

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import read_range, shown

# Bytes of a block, of the header at its beginning, and of a chunk's header (Riegeli's file format).
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
# Where the bytes of a stored file begin in its shard, how many they are, and their CRC-32.
PLACE = np.dtype([("start", "<u8"), ("length", "<u4"), ("crc32", "<u4")])

REPAIR = "copy it again from where it was packed, or pack the dataset again"


@dataclass(frozen=True, slots=True)
class StoredFile(os.PathLike):
    """A file inside a shard; in messages it has the path that it had in its dataset."""

    path: str
    shard: str
    start: int
    length: int
    crc32: int

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    def read_bytes(self) -> bytes:
        """The file's bytes.

        Raises:
            InputError: the shard is missing or ends too early, or the bytes are not those that were packed.
        """
        data = _payload(read_range(self.shard, self.start, _span(self.start, self.length)), self.start)
        if len(data) < self.length:
            raise InputError(f"The shard {shown(self.shard)} ends within {shown(self.path)}; {REPAIR}.")
        if zlib.crc32(data) != self.crc32:
            raise InputError(
                f"The checksum of {shown(self.path)} in the shard {shown(self.shard)} is wrong; {REPAIR}."
            )
        return data


def write_shard(path: Path, contents: Iterable[bytes]) -> np.ndarray:
    """Write records into a new shard; returns the PLACE of each, every one read back."""
    from array_record.python.array_record_module import ArrayRecordWriter  # only who packs needs it

    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    written = []
    for content in contents:
        writer.write(content)
        written.append((0, len(content), zlib.crc32(content)))
    writer.close()
    places = np.array(written, PLACE)
    places["start"] = _starts(path, places["length"])
    for number, place in enumerate(places.tolist()):
        StoredFile(f"record {number}", str(path), *place).read_bytes()
    return places


def _starts(path: Path, lengths: np.ndarray) -> list[int]:
    """Where the bytes of every record of a shard begin."""
    starts, position = [], 0
    with open(path, "rb") as file:
        while len(starts) < len(lengths):
            file.seek(position)
            header = _payload(file.read(_CHUNK_HEADER + _BLOCK_HEADER), position)
            size, kind = struct.unpack_from("<8xQ8xB", header)
            position = _after(position, _CHUNK_HEADER)
            if kind == ord("r"):
                length = int(lengths[len(starts)])
                starts.append(_after(position, size - length))
            position = _after(position, size)
    return starts


def _span(start: int, length: int) -> int:
    """Bytes on disk of `length` bytes of data from `start` on, block headers included."""
    return _after(start, length) - start


def _after(position: int, count: int) -> int:
    """Where `count` bytes of data after `position` end; a block header before a byte is stepped over."""
    if not count:
        return position
    if position % _BLOCK == 0:
        position += _BLOCK_HEADER
    headers = (position % _BLOCK + count - 1 - _BLOCK_HEADER) // (_BLOCK - _BLOCK_HEADER)
    return position + count + headers * _BLOCK_HEADER


def _payload(raw: bytes, start: int) -> bytes:
    """Bytes that lie at `start` of a shard without the block headers among them."""
    first = -start % _BLOCK
    pieces = [raw[:first]]
    pieces += [raw[block + _BLOCK_HEADER : block + _BLOCK] for block in range(first, len(raw), _BLOCK)]
    return b"".join(pieces)
