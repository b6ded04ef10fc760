"""Checks of a dataset before it costs anybody a training run."""

import collections
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from PIL import Image
from rich.table import Table

from unibiomed_jax.data.readers import NO_FINDINGS, find_datasets, read_dataset, upright_size
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.data.writer import SPLITS
from unibiomed_jax.errors import InputError


@dataclass(frozen=True)
class ValidateOptions:
    """Check a dataset: files, sizes, masks, texts, patients, names."""

    # Folder of one or more datasets.
    path: Annotated[Path, tyro.conf.Positional]
    # Problems to print; all are counted.
    show: int = 20


@dataclass(frozen=True)
class Problem:
    """Something wrong; an error stops or spoils training, a warning may be meant."""

    dataset: str
    # What is wrong in a few words, the same for all problems of a sort.
    sort: str
    # The whole sentence, with the offender.
    text: str
    error: bool = True


@dataclass
class DatasetSummary:
    """One line of the table."""

    title: str
    # Records by split.
    records: collections.Counter = field(default_factory=collections.Counter)
    images: set[str] = field(default_factory=set)
    patients: set[str] = field(default_factory=set)


@dataclass
class ValidationReport:
    """What `validate` found."""

    datasets: dict[str, DatasetSummary] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.error]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.problems if not problem.error]

    def table(self) -> Table:
        """For the terminal: one row a dataset, its records by split."""
        table = Table("dataset", *SPLITS, "images", "patients", "errors", "warnings")
        for row in self.datasets.values():
            found = [problem.error for problem in self.problems if problem.dataset == row.title]
            counts = [row.records[split] for split in SPLITS] + [len(row.images), len(row.patients)]
            table.add_row(row.title, *map(str, counts), str(sum(found)), str(len(found) - sum(found)))
        return table


class _Look(NamedTuple):
    # (width, height) as an image, EXIF rotation applied, and as a mask, whose pixels are taken as they lie.
    upright: tuple[int, int]
    size: tuple[int, int]
    # Whether the first channel is all zero.
    empty: bool


@dataclass
class _Files:
    """What is known of every file looked at so far, or in a word what is wrong with it."""

    known: dict[str, _Look | str] = field(default_factory=dict)

    def look(self, path: str) -> _Look | str:
        if path not in self.known:
            try:
                with Image.open(path) as image:
                    upright, pixels = upright_size(image), np.asarray(image)
                first = pixels[..., 0] if pixels.ndim == 3 else pixels
                self.known[path] = _Look(upright, pixels.shape[1::-1], not first.any())
            except FileNotFoundError:
                self.known[path] = "missing"
            except Exception:  # Pillow's plugins raise whatever their parser met
                self.known[path] = "unreadable"
        return self.known[path]


def validate(options: ValidateOptions) -> ValidationReport:
    """Check all datasets under a folder, every file of them.

    Errors: a table of another schema, an annotation without its file, a file that cannot be read, a mask of
    another size than its image, a size in the table that is not the image's, a patient in several splits of
    one folder. Warnings: an empty mask (unless the text says "no findings"), a mask named by two annotations,
    one image name in several splits of a folder, a patient in several splits of different folders.

    Raises:
        InputError: no dataset there at all.
    """
    report, files = ValidationReport(), _Files()
    # Of every patient, and of every image name: in which folder, in which split, by which dataset.
    people: dict[str, dict[tuple[str, str], str]] = collections.defaultdict(dict)
    names: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for config in _find(options.path):
        summary = report.datasets.setdefault(config.title, DatasetSummary(config.title))
        try:
            records = read_dataset(config)
        except InputError as error:
            report.problems.append(Problem(config.title, "schema", str(error)))
            continue
        summary.records[config.split] = len(records)
        report.problems += _check_records(config.title, records, files)
        for record in records:
            summary.images.update(record.images)
            if record.patient:
                summary.patients.add(record.patient)
                people[record.patient].setdefault((config.root, config.split), config.title)
            if config.kind is not Kind.SEQUENCE:
                parts = Path(record.images[0]).relative_to(config.root).parts
                name = "/".join(part for part in parts if part != config.split)
                names[config.root, name].setdefault(config.split, config.title)
    report.problems += _check_people(people)
    report.problems += _check_names(names)
    return report


def _find(path: Path) -> list[DatasetConfig]:
    configs, first = [], None
    for split in SPLITS:
        try:
            configs += find_datasets(path, split)
        except InputError as error:
            first = first or error
    if not configs:
        raise first
    return configs


def _check_records(title: str, records: list[Record], files: _Files) -> list[Problem]:
    problems = []
    uses = collections.Counter()
    for record in records:
        for number, path in enumerate(record.images):
            image = files.look(path)
            if isinstance(image, str):
                problems.append(Problem(title, image, f"{record.name}: the image {path} is {image}."))
            elif min(record.size) > 0 and image.upright != record.size:
                size = f"{_show(image.upright)} (upright)"
                text = f"{record.name}: {path} is {size} but the table says {_show(record.size)}."
                problems.append(Problem(title, "table size", text))
            for mask in (frames[number] for frames in record.masks):
                if mask:
                    uses[mask, record.texts] += 1
                    problems += _check_mask(title, record, mask, files.look(mask), image)
    for (path, _), count in uses.items():
        if count > 1:
            text = f"{path} is the mask of {count} annotations with the same text; remove all but one."
            problems.append(Problem(title, "duplicate", text, error=False))
    return problems


def _check_mask(title: str, record: Record, path: str, mask, image) -> list[Problem]:
    if isinstance(mask, str):
        return [Problem(title, mask, f"{record.name}: the mask {path} is {mask}.")]
    problems = []
    if not isinstance(image, str) and mask.size != image.upright:
        sizes = f"{_show(mask.size)} but its image {_show(image.upright)} (upright)"
        text = f"{record.name}: the mask {path} is {sizes}."
        problems.append(Problem(title, "mask size", text))
    if mask.empty and not any(NO_FINDINGS in text.lower() for text in record.texts):
        text = f"{record.name}: the mask {path} is empty; draw it, or say '{NO_FINDINGS}' in the text."
        problems.append(Problem(title, "empty mask", text, error=False))
    return problems


def _check_people(people: dict[str, dict[tuple[str, str], str]]) -> list[Problem]:
    problems = []
    for patient, places in people.items():
        splits = sorted({split for _, split in places})
        if len(splits) > 1:
            inside = len({root for root, _ in places}) < len(places)
            titles = sorted(set(places.values()))
            text = (
                f"The patient {patient} is in {' and '.join(splits)} of {', '.join(titles)}; keep all images "
                "of a patient in one split."
            )
            problems += [Problem(title, "leaking patient", text, error=inside) for title in titles]
    return problems


def _check_names(names: dict[tuple[str, str], dict[str, str]]) -> list[Problem]:
    problems = []
    for (_, name), places in names.items():
        if len(places) > 1:
            titles = sorted(set(places.values()))
            splits = " and ".join(sorted(places))
            text = f"The image {name} is in {splits} of {', '.join(titles)}; is it the same?"
            problems += [Problem(title, "name in two splits", text, error=False) for title in titles]
    return problems


def _show(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"
