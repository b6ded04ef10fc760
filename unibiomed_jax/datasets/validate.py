"""Checks of a dataset before it costs anybody a training run."""

import collections
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.table import Column, Table

from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.packed import check_packed, is_packed
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.data.tables import NO_FINDINGS, read_dataset
from unibiomed_jax.datasets.write import SPLITS
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import shown
from unibiomed_jax.inputs.images import open_image
from unibiomed_jax.inputs.masks import open_mask
from unibiomed_jax.inputs.shards import StoredFile


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
        """For the terminal: one row per dataset, its records by split."""
        table = Table(
            Column("dataset", overflow="fold", min_width=20),
            *SPLITS,
            "images",
            "patients",
            "errors",
            "warnings",
        )
        for row in self.datasets.values():
            found = [problem.error for problem in self.problems if problem.dataset == row.title]
            counts = [row.records[split] for split in SPLITS] + [len(row.images), len(row.patients)]
            table.add_row(row.title, *map(str, counts), str(sum(found)), str(len(found) - sum(found)))
        return table


class _Mask(NamedTuple):
    # (width, height), upright.
    size: tuple[int, int]
    # Whether nothing is inside.
    empty: bool


class _Wrong(NamedTuple):
    # What is wrong with a file, in a word and in a sentence.
    sort: str
    text: str


@dataclass
class _Files:
    """What is known of every file looked at so far, read as training reads it."""

    # (width, height), upright.
    images: dict[str | StoredFile, tuple[int, int] | _Wrong] = field(default_factory=dict)
    masks: dict[str | StoredFile, _Mask | _Wrong] = field(default_factory=dict)

    def image(self, path: str | StoredFile) -> tuple[int, int] | _Wrong:
        if path not in self.images:
            try:
                self.images[path] = open_image(path)[0].size
            except InputError as error:
                missing = not isinstance(path, StoredFile) and not Path(path).exists()
                self.images[path] = _Wrong("missing" if missing else "unreadable", str(error))
        return self.images[path]

    def mask(self, path: str | StoredFile) -> _Mask | _Wrong:
        if path not in self.masks:
            try:
                mask = open_mask(path)
                self.masks[path] = _Mask(mask.shape[::-1], not mask.any())
            except InputError as error:
                if not isinstance(path, StoredFile) and not Path(path).exists():
                    self.masks[path] = _Wrong("missing", f"the mask {shown(path)} is missing.")
                else:
                    self.masks[path] = _Wrong("unreadable", str(error))
        return self.masks[path]


def validate(options: ValidateOptions) -> ValidationReport:
    """Check all datasets under a folder, every file of them, packed ones by their checksums, too.

    Errors: a damaged file of a packed dataset (whose records are not looked at then), a table or an entry of
    another schema, an annotation without its file, a file that cannot be read, a mask of another size than
    its image, a size in the table that is not the image's, slices of several sizes, a patient in several
    splits of one folder. Warnings: an empty mask (unless the text says "no findings"), a mask named by two
    annotations of one text or by two images, one image or volume name in several splits of a folder, a
    patient in several splits of different folders.

    Raises:
        InputError: no dataset there at all.
    """
    report, files = ValidationReport(), _Files()
    # Of every patient, and of every image name: in which folder, in which split, by which dataset.
    people: dict[str, dict[tuple[str, str], str]] = collections.defaultdict(dict)
    names: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    # Of every packed folder: which of its files are damaged.
    damage: dict[str, list[str]] = {}
    for config in _find(options.path):
        summary = report.datasets.setdefault(config.title, DatasetSummary(config.title))
        wrong: list[str] = []
        if is_packed(config.root) and config.root not in damage:
            damage[config.root] = list(check_packed(config.root))
            report.problems += [Problem(config.title, "damaged", text) for text in damage[config.root]]
        if damage.get(config.root):
            continue
        try:
            records = read_dataset(config, wrong)
        except InputError as error:
            records, wrong = [], [str(error)]
        report.problems += [Problem(config.title, "schema", text) for text in wrong]
        summary.records[config.split] = len(records)
        report.problems += _check_records(config.title, records, files)
        for record in records:
            summary.images.update(map(os.fspath, record.images))
            if record.patient:
                summary.patients.add(record.patient)
                people[record.patient].setdefault((config.root, config.split), config.title)
            image = os.path.relpath(record.images[0], config.root)
            if config.kind is Kind.SEQUENCE:
                image = os.path.dirname(image)
            name = "/".join(part for part in Path(image).parts if part != config.split)
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


def _check_records(title: str, records: Sequence[Record], files: _Files) -> list[Problem]:
    problems = []
    # Of every mask: the image and the texts of every annotation that names it.
    uses: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for record in records:
        for number, path in enumerate(record.images):
            image = files.image(path)
            first = files.image(record.images[0])
            if isinstance(image, _Wrong):
                problems.append(Problem(title, image.sort, f"{record.name}: {image.text}"))
            elif min(record.size) > 0 and image != record.size:
                size = f"{_show(image)} (upright)"
                text = f"{record.name}: {path} is {size} but the table says {_show(record.size)}."
                problems.append(Problem(title, "table size", text))
            elif not isinstance(first, _Wrong) and image != first:
                text = f"{record.name}: {path} is {_show(image)} but {record.images[0]} {_show(first)}."
                problems.append(Problem(title, "slice size", text))
            for mask in (frames[number] for frames in record.masks):
                if mask:
                    uses[os.fspath(mask)][os.fspath(path), record.texts] += 1
                    problems += _check_mask(title, record, mask, files.mask(mask), image)
    for path, named in uses.items():
        images = sorted({image for image, _ in named})
        if len(images) > 1:
            text = f"{path} is the mask of {len(images)} images ({', '.join(images)}); is that meant?"
            problems.append(Problem(title, "duplicate", text, error=False))
        elif max(named.values()) > 1:
            count = max(named.values())
            text = f"{path} is the mask of {count} annotations with the same text; remove all but one."
            problems.append(Problem(title, "duplicate", text, error=False))
    return problems


def _check_mask(
    title: str, record: Record, path: str | StoredFile, mask: _Mask | _Wrong, image: tuple[int, int] | _Wrong
) -> list[Problem]:
    if isinstance(mask, _Wrong):
        return [Problem(title, mask.sort, f"{record.name}: {mask.text}")]
    problems = []
    if not isinstance(image, _Wrong) and mask.size != image:
        text = f"{record.name}: the mask {path} is {_show(mask.size)} but its image {_show(image)} (upright)."
        problems.append(Problem(title, "mask size", text))
    if mask.empty and not any(NO_FINDINGS in text for text in record.texts):
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
            text = f"The image or volume {name} is in {splits} of {', '.join(titles)}; is it the same?"
            problems += [Problem(title, "name in two splits", text, error=False) for title in titles]
    return problems


def _show(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"
