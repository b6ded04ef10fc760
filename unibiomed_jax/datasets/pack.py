"""Datasets to packed datasets: every image and mask as it is on disk, in few large files."""

import contextlib
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from unibiomed_jax import locks
from unibiomed_jax.config.fields import ONE_OR_MORE, Address, require_limits
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.data.files import check_files, image_size
from unibiomed_jax.data.mixture import NoTableError, find_datasets
from unibiomed_jax.data.packed import (
    INDEX,
    PackedRecords,
    file_entry,
    is_packed,
    records_digest,
    to_row,
    write_index,
    write_rows,
)
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.data.streamed import Spilled
from unibiomed_jax.data.tables import read_table, records_of
from unibiomed_jax.data.transforms import SampleBuilder, SampleConfig, SampleSizes
from unibiomed_jax.datasets.write import SPLITS
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import in_bucket, local_file, locate, open_file, require_space, shown, write_beside
from unibiomed_jax.inputs.shards import write_shard
from unibiomed_jax.inputs.tokenizer import Tokenizer

# Tasks whose tables are the same: which of them a table serves is the configuration's choice.
_TARGETS = (Kind.SEGMENTATION, Kind.DISEASE, Kind.REGION)


@dataclass(frozen=True)
class PackOptions:
    """Pack a dataset: its files into a few large shards with an index, for shared storage and many hosts.

    Files are kept as they are, byte for byte; training reads the packed dataset as it reads the folder, and
    gets the same batches. What was packed before an interruption is kept: run the same command again.
    """

    # Folder of one or more datasets.
    path: Annotated[Address, tyro.conf.Positional]
    # Folder to write; appears when all is done, in a bucket its packed.json does.
    out: Annotated[Address, tyro.conf.Positional]
    # Bytes of files in a shard, about.
    shard_bytes: Annotated[int, ONE_OR_MORE] = 256 << 20
    # Shards written at once; by default as many as there are processor cores.
    threads: Annotated[int | None, ONE_OR_MORE] = None
    # Folder of the tokenizer to train with (CHECKPOINT/tokenizer): the texts are measured now, and not when
    # the first run starts.
    tokenizer: Address | None = None

    def __post_init__(self):
        require_limits(self)


@dataclass
class PackReport:
    """What was packed."""

    folders: int = 0
    tables: int = 0
    # Rows of all tables.
    records: int = 0
    # Distinct images and masks, the shards they lie in and their bytes.
    files: int = 0
    shards: int = 0
    bytes: int = 0
    # Shards that an earlier, interrupted run had written.
    kept: int = 0


def pack(options: PackOptions) -> PackReport:
    """Pack all datasets under a folder, each folder with tables into one of the same place below `out`.

    Memory holds the name and place of every file; tables and contents pass through, one file for each thread.

    Raises:
        InputError: no dataset there, or one that could not be trained on; it is packed already; `out` exists,
            is being written by another process, or holds the beginning of something else; no space; no
            tokenizer.
    """
    tokenizer = Tokenizer.from_folder(options.tokenizer) if options.tokenizer else None
    out = options.out.absolute()
    partial = out if in_bucket(out) else out.with_name(f".{out.name}.partial")
    begun = in_bucket(out) and any((out / name).exists() for name in (_SOURCE, _LOCK))
    if out.exists() and not begun:
        raise InputError(f"{shown(out)} exists; choose another folder, or delete it to pack again.")
    datasets = _find(options.path)
    report = PackReport()
    with _own(partial, options.path) as lock:
        packers = []
        for folder, tables in datasets.items():
            place = partial / os.path.relpath(folder, options.path)
            place.mkdir(parents=True, exist_ok=True)
            packers.append(_FolderPacker(place, options, report))
            packers[-1].pack(tables)
            lock.check()
        for packer in packers:
            packer.write_index()
        if tokenizer is not None:
            _measure_texts(partial, tokenizer)
            lock.check()
        for packer in packers:
            packer.forget()
        for leftover in (_SOURCE, _LOCK):
            (partial / leftover).unlink()
        if partial != out:
            os.replace(partial, out)
    return report


def _measure_texts(packed: Path, tokenizer: Tokenizer) -> None:
    """Leave the lengths of all texts beside their tables, as a run with the usual prompts needs them."""
    builder = SampleBuilder(SampleConfig(), SampleSizes.of(ModelConfig()), tokenizer, seed=0)
    for split in SPLITS:
        with contextlib.suppress(NoTableError):
            for config in find_datasets(packed, split):
                builder.text_lengths(PackedRecords(config))


# Beside what is not yet complete: where it comes from, who writes it; beside a shard: that it is complete.
_SOURCE, _LOCK, _DONE = ".source", ".lock", ".packed.npz"
# More than there are files in a shard.
_NUMBERS = 1 << 32


def _find(path: Path) -> dict[str, list[DatasetConfig]]:
    """A dataset of every table below a folder, by the folder in which the table lies."""
    found: dict[str, list[DatasetConfig]] = {}
    error = None
    for split in SPLITS:
        try:
            datasets = find_datasets(path, split)
        except InputError as caught:
            error = error or caught
            continue
        for config in datasets:
            if is_packed(config.root):
                raise InputError(
                    f"{shown(config.root)} is packed already; pack the folder that it was made from."
                )
            tables = found.setdefault(config.root, [])
            if config.annotations not in [known.annotations for known in tables]:
                tables.append(config)
    if not found:
        raise error
    return found


@contextlib.contextmanager
def _own(partial: Path, source: Path) -> Iterator[locks.Lock]:
    """Hold a folder in which this process alone packs this source."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{shown(partial)} cannot be written ({error.strerror}); choose another place."
        ) from None
    does, remedy = f"is writing {shown(partial)}", "wait for it or choose another folder"
    with locks.hold(partial / _LOCK, does=does, remedy=remedy) as lock:
        wanted = shown(source.resolve())
        begun = partial / _SOURCE
        if begun.exists() and begun.read_text() != wanted:
            raise InputError(
                f"{shown(partial)} holds the beginning of a pack of {begun.read_text()}; delete it or choose "
                "another folder."
            )
        begun.write_text(wanted)
        yield lock


@dataclass(frozen=True)
class _Shard:
    # PLACE of every file in it.
    places: np.ndarray
    # What the index says about it.
    entry: dict[str, Any]
    # Whether an earlier run wrote it.
    kept: bool


class _FolderPacker:
    """Packs the tables of one folder and the files that they name, each file once."""

    def __init__(self, place: Path, options: PackOptions, report: PackReport):
        self.place, self.options, self.report = place, options, report
        # Of every file: shard * _NUMBERS + number in it. (A tuple would take twice the memory.)
        self.numbers: dict[str, int] = {}
        self.shards: list[_Shard] = []
        self.index: dict[str, Any] = {}
        # Of a bucket: what is in its folders.
        self.listings: dict[str, dict[str, dict]] = {}

    def pack(self, configs: Sequence[DatasetConfig]) -> None:
        """Write all but the index."""
        tables = {config.annotations: self._pack_table(config) for config in configs}
        shards = {_shard_name(number): shard.entry for number, shard in enumerate(self.shards)}
        name = Path(configs[0].name).parent.as_posix()  # without the task
        self.index = {"name": name, "tables": tables, "shards": shards}
        self._remove_leftovers(tables, shards)
        self.report.folders += 1
        self.report.tables += len(tables)
        self.report.files += len(self.numbers)
        self.report.shards += len(shards)
        self.report.bytes += sum(entry["bytes"] for entry in shards.values())
        self.report.kept += sum(shard.kept for shard in self.shards)

    def write_index(self) -> None:
        """Make the folder a packed one."""
        write_index(self.place, self.index)

    def forget(self) -> None:
        """Take away what says how far packing has come: all is done."""
        for shard in self.index["shards"]:
            (self.place / f"{shard}{_DONE}").unlink()

    def _pack_table(self, config: DatasetConfig) -> dict[str, Any]:
        """Pack what one table names; returns what the index says about it."""
        datasets = _readings(config)
        (config, records), *others = datasets
        digests = {str(config.kind): records_digest(records, config)}
        for other, found in others:
            digests[str(other.kind)] = records_digest(found, other)
        if config.kind in _TARGETS:
            digests = dict.fromkeys(map(str, _TARGETS), *digests.values())
        if config.kind is Kind.VQA:  # a question's row tells the report, too
            ((_, reports),) = others
            records = Spilled(
                replace(record, report=report.report) for record, report in zip(records, reports, strict=True)
            )
        sizes = check_files(records)
        self._pack_files(sizes)
        rows = (
            (to_row(record, config, self._place_of), _size(record, sizes), len(record.masks))
            for record in records
        )
        written = write_rows(self.place, config.annotations, rows, len(records))
        self.report.records += len(records)
        return written | {
            "digests": digests,
            "images": os.path.relpath(config.image_folder, config.root),
            "masks": os.path.relpath(config.mask_folder, config.root),
        }

    def _place_of(self, path: str) -> tuple[int, int, int, int]:
        shard, number = divmod(self.numbers[path], _NUMBERS)
        return (shard, *self.shards[shard].places[number].item())

    def _pack_files(self, paths: Iterable[str]) -> None:
        """Write those that no shard holds yet into new shards, in order."""
        new = [path for path in paths if path not in self.numbers]
        shards = list(self._cut(new))
        require_space(self.place / "shards", sum(size for _, size in shards))
        first = len(self.shards)
        with ThreadPoolExecutor(self.options.threads or os.cpu_count()) as pool:
            try:
                written = list(
                    pool.map(self._pack_shard, itertools.count(first), (members for members, _ in shards))
                )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for shard, (members, _) in enumerate(shards, first):
            self.numbers |= {path: shard * _NUMBERS + number for number, path in enumerate(members)}
        self.shards += written

    def _pack_shard(self, number: int, members: list[str]) -> "_Shard":
        """Write one shard, or find it as an earlier run left it."""
        path = self.place / _shard_name(number)
        done = path.with_name(f"{path.name}{_DONE}")
        states = [(file, *self._state(file)) for file in members]
        key = hashlib.sha256(repr(states).encode("utf-8", "surrogatepass")).hexdigest()
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zlib.error):
            with open_file(done) as file, np.load(file) as kept:
                places, entry, known = kept["places"], json.loads(str(kept["entry"])), str(kept["key"])
            if known == key and _holds(path, entry):
                return _Shard(places, entry, kept=True)
        done.unlink(missing_ok=True)
        with local_file(path) as local:
            places = write_shard(local, (locate(file).read_bytes() for file in members))
            entry = file_entry(local)
        write_beside(done, lambda file: np.savez(file, places=places, entry=json.dumps(entry), key=key))
        return _Shard(places, entry, kept=False)

    def _cut(self, paths: Iterable[str]) -> Iterator[tuple[list[str], int]]:
        """Runs of files that fill a shard each, and their bytes."""
        members, size = [], 0
        for path in paths:
            members.append(path)
            size += self._state(path)[0]
            if size >= self.options.shard_bytes:
                yield members, size
                members, size = [], 0
        if members:
            yield members, size

    def _state(self, path: str) -> tuple[int, Any]:
        """Bytes of a file, and what changes with its content."""
        if not in_bucket(path):
            found = os.stat(path)
            return found.st_size, found.st_mtime_ns
        folder, name = os.path.split(path)
        if folder not in self.listings:
            self.listings[folder] = locate(folder).walk_files()
        entry = self.listings[folder][name]
        return entry["size"], entry.get("crc32c") or entry["ETag"]

    def _remove_leftovers(self, tables: Iterable[str], shards: Iterable[str]) -> None:
        """Delete shards of an earlier, interrupted run over other files."""
        wanted = {INDEX, _SOURCE, _LOCK}
        wanted |= {f"{table}{ending}" for table in tables for ending in (".rows", ".columns.npy")}
        wanted |= {f"{shard}{ending}" for shard in shards for ending in ("", _DONE)}
        for path in self.place.iterdir():
            if path.is_file() and path.name not in wanted:
                path.unlink()


def _readings(config: DatasetConfig) -> list[tuple[DatasetConfig, Sequence[Record]]]:
    """The records of a table, once for every task that reads it in its own way."""
    table = read_table(config.annotation_path, config.kind)
    if config.kind in _TARGETS and _holds_captions(table):
        config = replace(config, kind=Kind.CAPTION, images=None, masks=None)
    kinds = (Kind.VQA, Kind.REPORT) if config.kind is Kind.VQA else (config.kind,)
    configs = [
        replace(config, kind=kind, name=(Path(config.name).parent / kind).as_posix()) for kind in kinds
    ]
    return [(config, Spilled(records_of(config, table))) for config in configs]


def _holds_captions(table) -> bool:
    """Whether a table is one of captions under the name of one of targets, as MedTrinity's is."""
    annotations = table.get("annotations") if isinstance(table, dict) else None
    first = annotations[0] if isinstance(annotations, list | Spilled) and annotations else None
    return isinstance(first, dict) and "caption" in first and "mask_file" not in first


def _size(record: Record, sizes: dict[str, tuple[int, int] | None]) -> tuple[int, int]:
    """(width, height) of a record's images, pixels; a volume needs none to be planned."""
    known = record.size if min(record.size) > 0 else sizes[record.images[0]]
    return known or ((0, 0) if record.kind is Kind.SEQUENCE else image_size(record))


def _holds(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is as it was written; of one in a bucket, which appears whole, the size tells."""
    return path.stat().st_size == entry["bytes"] if in_bucket(path) else file_entry(path) == entry


def _shard_name(number: int) -> str:
    return f"files-{number:05d}.arrayrecord"
