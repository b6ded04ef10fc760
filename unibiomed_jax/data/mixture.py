"""Several datasets as one list of samples."""

import bisect
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from unibiomed_jax.data.packed import PackedRecords, is_packed, read_index, records_digest
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import in_bucket, locate, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mixture:
    """Several datasets as one list of samples, repeats included."""

    # Every record once, dataset after dataset.
    records: "Records"
    # Sample i of the mixture is records[order[i]]; repeats stand here.
    order: np.ndarray
    # Title, records and samples (repeats counted) of every dataset, for logs.
    sizes: tuple[tuple[str, int, int], ...]
    # Of all that the records say; it does not change when a dataset's folder moves.
    fingerprint: str


class Records(Sequence[Record]):
    """Several lists of records as one; each of the `parts` is of one kind."""

    def __init__(self, parts: Sequence[Sequence[Record]]):
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Record:
        part = bisect.bisect_right(self._ends, number)
        return self.parts[part][number - (self._ends[part] - len(self.parts[part]))]

    def __iter__(self) -> Iterator[Record]:
        return itertools.chain.from_iterable(self.parts)


class NoTableError(InputError):
    """There is no table of a split, which may be meant."""


# Table names by which `find_datasets` knows a task.
_TASK_TABLES = (
    ("{split}.json", (Kind.SEGMENTATION,)),
    ("meta_{split}.json", (Kind.SEQUENCE,)),
    ("{split}_disease.json", (Kind.DISEASE,)),
    ("{split}_region.json", (Kind.REGION,)),
    ("{split}_parse.json", (Kind.VQA, Kind.REPORT)),
    ("{split}_captions.json", (Kind.CAPTION,)),
)

_BESIDE_IMAGES = (Kind.SEGMENTATION, Kind.DISEASE, Kind.REGION)


def find_datasets(root: str | os.PathLike, split: str = "train", **choices) -> tuple[DatasetConfig, ...]:
    """The datasets of a folder and its sub-folders, links followed, recognised by the names of their tables.

    `{split}.json` segmentation, `meta_{split}.json` sequences, `{split}_disease.json`, `{split}_region.json`,
    `{split}_parse.json` (grounded questions and reports), `{split}_captions.json`. Where there is no folder
    `{split}`, image paths are relative to the dataset's folder. Packed datasets (`unibiomed data pack`) are
    found as the folders they were made from, under the same names.

    Args:
        root: searched with all folders below it; a folder that links also reach counts once.
        split: which tables.
        choices: further fields of every DatasetConfig (balance_to, repeats, slices).

    Raises:
        InputError: no such folder, or no table in it.
    """
    root = locate(root)
    if not root.is_dir():
        wrong = (
            "is a file; give the folder it lies in" if root.is_file() else "does not exist; check the path"
        )
        raise InputError(f"The dataset folder {shown(root)} {wrong}.")
    found = []
    for folder in sorted(_folders(root)):
        index = read_index(folder) if is_packed(folder) else None
        title = root.resolve().name / folder.relative_to(root)
        if index is not None:  # a packed dataset keeps its name wherever it lies
            title = Path(index["name"])
        for pattern, kinds in _TASK_TABLES:
            name = pattern.format(split=split)
            flat = kinds[0] in _BESIDE_IMAGES and not (folder / split).is_dir()
            images = masks = "" if flat else None
            if index is not None:
                if name not in index["tables"]:
                    continue
                table = index["tables"][name]
                images, masks = table["images"], table["masks"]
                if not set(kinds) <= set(table["digests"]):  # captions under the name of another task
                    kinds = tuple(map(Kind, table["digests"]))
            elif not (folder / name).is_file():
                continue
            for kind in kinds:
                found.append(
                    DatasetConfig(
                        kind,
                        str(folder),
                        name=(title / kind).as_posix(),
                        split=split,
                        annotations=name,
                        images=images,
                        masks=masks,
                        **choices,
                    )
                )
    if not found:
        raise NoTableError(
            f"{shown(root)} holds no table for the split {split!r} (such as {split}.json); see "
            "docs/train_on_your_data.md, or write one with `unibiomed data build`."
        )
    return tuple(found)


def find_validation(root: str | os.PathLike, split: str = "val", **choices) -> tuple[DatasetConfig, ...]:
    """As `find_datasets`, but none where the folder has no table of the split: a few patients fill no splits.

    Raises:
        InputError: no such folder.
    """
    try:
        return find_datasets(root, split, **choices)
    except NoTableError as error:
        logger.warning("Training goes without validation: %s", error)
        return ()


def _folders(root: Path) -> Iterator[Path]:
    """A folder and all below it, each once even where links meet or form a loop.

    Of a bucket those that hold a table: each one looked into would take several requests.
    """
    if in_bucket(root):
        names = (PurePosixPath(name) for name in root.walk_files() if name.endswith(".json"))
        yield from {root / name.parent for name in names}
        return
    starts, seen = [root], set()
    for start in starts:  # grows by the links, whose turn comes after that of all folders without one
        for path, inner, _ in os.walk(start):  # does not follow links
            real = os.path.realpath(path)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            yield Path(path)
            inner.sort()
            starts += [link for name in inner if os.path.islink(link := os.path.join(path, name))]


def read_mixture(datasets: Sequence[DatasetConfig]) -> Mixture:
    """Read every dataset and lay them end to end, each list repeated as its configuration says.

    Raises:
        InputError: no datasets, two of one title, or any error of `read_dataset`.
    """
    if not datasets:
        raise InputError("The mixture has no datasets; name at least one.")
    parts: list[Sequence[Record]] = []
    records = 0
    order: list[np.ndarray] = []
    sizes = []
    titles = set()
    digest = hashlib.sha256()
    for config in datasets:
        title = f"{config.title} ({config.split})"
        if title in titles:
            raise InputError(
                f"Two datasets of the mixture are called {title}; give one of them another name."
            )
        titles.add(title)
        found = read_dataset(config)
        span = np.arange(records, records + len(found))
        order.append(np.tile(span, config.repetitions(len(found))))
        sizes.append((title, len(found), len(order[-1])))
        parts.append(found)
        records += len(found)
        content = found.digest if isinstance(found, PackedRecords) else records_digest(found, config)
        slices = config.slices if config.kind is Kind.SEQUENCE else 0
        shared = (title, config.kind, slices, config.augment)
        digest.update(f"{shared} {content}\n".encode("utf-8", "surrogatepass"))
    return Mixture(Records(parts), np.concatenate(order), tuple(sizes), digest.hexdigest())
