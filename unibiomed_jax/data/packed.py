"""Packed datasets: every record's words and places of its files in rows, the files themselves in shards.

A packed folder stands for one dataset folder: `packed.json`, the shards, and for every table `TABLE.rows` (a
JSON line a record), `TABLE.columns.npy` (what a run needs of all records before its first batch) and, once
measured, the lengths of its texts. A row is read when its record is asked for.
"""

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int32, UInt32

from unibiomed_jax.data.records import DatasetConfig, Kind, Record, without_place
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import (
    local_file,
    locate,
    open_file,
    read_json,
    read_range,
    shown,
    sizes,
    write_beside,
)
from unibiomed_jax.inputs.shards import REPAIR, StoredFile

logger = logging.getLogger(__name__)

INDEX = "packed.json"
VERSION = 1
# Of every record: where its row begins, the row's CRC-32, the size of its upright images in pixels, how many
# masks it has. One more entry says where the last row ends.
_COLUMNS = np.dtype(
    [("start", "<u8"), ("crc32", "<u4"), ("width", "<u4"), ("height", "<u4"), ("objects", "<u4")]
)
# Bytes of rows that are read at once where all are wanted.
_READ = 1 << 22


def is_packed(folder: str | os.PathLike) -> bool:
    """Whether `unibiomed data pack` wrote this folder."""
    return (locate(folder) / INDEX).is_file()


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """What a packed folder holds: `name`, `tables` and `shards`.

    Raises:
        InputError: the index is damaged or of another version.
    """
    path = locate(folder) / INDEX
    index = read_json(path, remedy=REPAIR)
    version = index.get("version") if isinstance(index, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise InputError(
            f"{shown(path)} is of version {version} but this program reads {VERSION}; pack the dataset again."
        )
    content = index.get("content") if isinstance(index, dict) else None
    if not isinstance(content, dict) or version is None or index.get("sha256") != _digest_of(content):
        raise InputError(f"{shown(path)} is damaged; {REPAIR}.")
    for name in (*content["tables"], *content["shards"]):
        if Path(name).name != name:  # written by somebody else: files are read in this folder alone
            raise InputError(f"{shown(path)} names {shown(name)}, which is not in its folder; {REPAIR}.")
    return content


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Write the index, which makes a folder a packed one."""
    index = {"version": VERSION, "sha256": _digest_of(content), "content": content}
    write_beside(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def _digest_of(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_entry(path: Path) -> dict[str, int | str]:
    """What the index says about a file: its bytes and their checksum."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def records_digest(records: Iterable[Record], config: DatasetConfig) -> str:
    """Of all that a table's records say, wherever its folder lies and whatever the dataset is called."""
    digest = hashlib.sha256()
    for record in records:
        told = without_place(record, config)
        words = (told.texts, told.anatomy, told.report, told.question)
        digest.update(repr((told.name, told.images, told.masks, *words)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def to_row(record: Record, config: DatasetConfig, place: Callable[[str], tuple[int, int, int, int]]) -> bytes:
    """A record as a line of JSON; `place` gives shard, start, length and checksum of a file."""
    told = without_place(record, config)

    def entry(name: str, path: str) -> tuple | None:
        return (name, *place(path)) if path else None

    row = [
        told.name,
        [entry(*both) for both in zip(told.images, record.images, strict=True)],
        [
            [entry(*both) for both in zip(names, paths, strict=True)]
            for names, paths in zip(told.masks, record.masks, strict=True)
        ],
        record.texts,
        record.anatomy,
        record.report,
        record.question,
        record.patient,
    ]
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def write_rows(
    folder: Path, name: str, rows: Iterable[tuple[bytes, tuple[int, int], int]], count: int
) -> dict[str, Any]:
    """Write the rows and columns of a table; returns what the index says about them.

    Args:
        folder: the packed one.
        name: of the table.
        rows: of every record: its row, the (width, height) of its images in pixels, its number of masks.
        count: how many there are.
    """
    columns = np.zeros(count + 1, _COLUMNS)
    written, kept = _beside(folder / name, ".rows"), _beside(folder / name, ".columns.npy")
    with local_file(written) as local:
        with open(local, "wb") as file:
            for number, (row, size, objects) in enumerate(rows):
                columns[number] = (file.tell(), zlib.crc32(row), *size, objects)
                file.write(row)
            columns["start"][-1] = file.tell()
        entries = {"rows": file_entry(local)}
    with local_file(kept) as local:
        np.save(local, columns)
        entries["columns"] = file_entry(local)
    return {"records": count} | entries


class PackedRecords(Sequence[Record]):
    """The records of one packed dataset, each made when it is asked for.

    Attributes:
        kind, slices: of every record.
        digest: as `records_digest` of the table it was packed from.
        sizes: (width, height) of every record's upright images, pixels.
        objects: masks of every record.
    """

    digest: str
    sizes: UInt32[np.ndarray, "records 2"]
    objects: UInt32[np.ndarray, " records"]

    def __init__(self, config: DatasetConfig):
        """Open a packed dataset; its shards are looked at by their sizes.

        Raises:
            InputError: the folder holds no such table, something of it is missing, truncated or of another
                checksum, or of another version.
        """
        self.config, self.kind = config, config.kind
        self.slices = config.slices if config.kind is Kind.SEQUENCE else 0
        folder, name = locate(config.root), config.annotation_path.name
        index = read_index(folder)
        table = index["tables"].get(name)
        if table is None or config.kind not in table["digests"]:
            held = ", ".join(
                f"{held} ({'/'.join(entry['digests'])})" for held, entry in sorted(index["tables"].items())
            )
            raise InputError(f"{shown(folder)} was packed without {name} for {config.kind}; it holds {held}.")
        for what, wanted in (("images", config.image_folder), ("masks", config.mask_folder)):
            if os.path.normpath(wanted) != os.path.normpath(folder / table[what]):
                raise InputError(
                    f"{name} of {shown(folder)} was packed with its {what} in {table[what] or 'the root'!r}, "
                    f"but {config.title} asks for {shown(wanted)}; leave `{what}` of the dataset out or pack "
                    "it so."
                )
        self.digest = table["digests"][config.kind]
        self._table, self._shards = (
            folder / name,
            [os.path.join(folder, shard) for shard in sorted(index["shards"])],
        )
        rows, columns = _beside(self._table, ".rows"), _beside(self._table, ".columns.npy")
        held = sizes(folder)
        _require_size(rows, table["rows"], held)
        for name, entry in index["shards"].items():
            _require_size(folder / name, entry, held)
        with _open_checked(columns, table["columns"], held) as file:
            found = np.load(file)
        self._starts, self._checksums = found["start"].copy(), found["crc32"].copy()
        self.sizes = np.stack([found["width"][:-1], found["height"][:-1]], 1)
        self.objects = found["objects"][:-1].copy()

    def __reduce__(self):  # in a process that reads, it is opened anew
        return PackedRecords, (self.config,)

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._record(number, self._rows(number, number + 1))

    def __iter__(self) -> Iterator[Record]:
        return self.span(0, len(self))

    def span(self, first: int, end: int) -> Iterator[Record]:
        """The records from number `first` to before `end`, whose rows are read many at once."""
        while first < end:
            last = int(np.searchsorted(self._starts, self._starts[first] + np.uint64(_READ), "right")) - 1
            last = min(max(last, first + 1), end)
            for number, row in enumerate(self._rows(first, last).splitlines(keepends=True), first):
                yield self._record(number, row)
            first = last

    def text_lengths(
        self, key: str, measure: Callable[[Sequence[Record]], Int32[np.ndarray, " records"]]
    ) -> Int32[np.ndarray, " records"]:
        """What `measure` gives for all records, kept beside the table for the next run.

        Args:
            key: of all that the lengths depend on beside the records.
            measure: called once a table and key.
        """
        key = hashlib.sha256(f"{self.digest} {self.kind} {self.slices} {key}".encode()).hexdigest()[:16]
        kept = _beside(self._table, f".lengths-{key}.npz")
        try:
            with open_file(kept) as file, np.load(file) as archive:  # which has a checksum
                lengths = archive["lengths"]
            if lengths.shape == (len(self),) and lengths.dtype == np.int32:
                return lengths
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):  # not there yet, or damaged
            pass
        lengths = measure(self)
        try:
            write_beside(kept, lambda file: np.savez(file, lengths=lengths))
        except (OSError, BucketError) as error:
            logger.warning(
                "The lengths of the texts are measured at every start, since %s cannot be written (%s).",
                shown(kept),
                getattr(error, "strerror", error),
            )
        return lengths

    def _rows(self, first: int, last: int) -> bytes:
        start, end = int(self._starts[first]), int(self._starts[last])
        rows = read_range(_beside(self._table, ".rows"), start, end - start)
        if len(rows) != end - start:
            raise InputError(f"{shown(_beside(self._table, '.rows'))} is truncated; {REPAIR}.")
        return rows

    def _record(self, number: int, row: bytes) -> Record:
        if zlib.crc32(row) != self._checksums[number]:
            rows = shown(_beside(self._table, ".rows"))
            raise InputError(f"The checksum of row {number} of {rows} is wrong; {REPAIR}.")
        config = self.config
        name, images, masks, texts, anatomy, report, question, patient = json.loads(row)
        return Record(
            name=f"{config.title}:{config.split}/{name}",
            kind=config.kind,
            images=tuple(self._file(*image) for image in images),
            masks=tuple(tuple(self._file(*mask) if mask else "" for mask in frames) for frames in masks),
            texts=tuple(texts),
            anatomy="" if config.kind is Kind.REPORT else anatomy,
            report=report if config.kind is Kind.REPORT else "",
            question=question,
            size=tuple(self.sizes[number].tolist()),
            slices=self.slices,
            augment=config.augment,
            patient=patient,
        )

    def _file(self, name: str, shard: int, start: int, length: int, crc32: int) -> StoredFile:
        return StoredFile(os.path.join(self.config.root, name), self._shards[shard], start, length, crc32)


def check_packed(folder: str | os.PathLike) -> Iterator[str]:
    """Read every file of a packed folder to its end; a sentence for each that is not as it was written.

    Raises:
        InputError: the index is damaged or of another version.
    """
    folder, index = locate(folder), read_index(folder)
    files = {folder / name: entry for name, entry in index["shards"].items()}
    for name, table in index["tables"].items():
        files[_beside(folder / name, ".rows")] = table["rows"]
        files[_beside(folder / name, ".columns.npy")] = table["columns"]
    held = sizes(folder)
    for path, entry in files.items():
        try:
            _open_checked(path, entry, held).close()
        except InputError as error:
            yield str(error)


def _beside(table: Path, ending: str) -> Path:
    return table.with_name(table.name + ending)


def _require_size(path: Path, entry: dict[str, Any], held: Mapping[str, int]) -> None:
    found = held.get(path.name)
    if found is None:
        raise InputError(f"{shown(path)} of a packed dataset is missing; {REPAIR}.")
    if found != entry["bytes"]:
        raise InputError(
            f"{shown(path)} of a packed dataset has {found} bytes instead of {entry['bytes']}; {REPAIR}."
        )


def _open_checked(path: Path, entry: dict[str, Any], held: Mapping[str, int]) -> BinaryIO:
    """A file whose size and checksum are those of the index."""
    _require_size(path, entry, held)
    file = open_file(path)
    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
        file.close()
        raise InputError(f"The checksum of {shown(path)} is wrong; {REPAIR}.")
    file.seek(0)
    return file
