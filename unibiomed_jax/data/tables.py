"""JSON tables on disk to records, one reader per table format. No pixel is read here."""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unibiomed_jax.data.packed import PackedRecords, is_packed
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.data.streamed import Spilled, SpilledObject, read_members
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import find_file, locate, read_json, shown, spelled
from unibiomed_jax.inputs.images import by_number

# A finding with these words has nothing to outline: its mask is all zero, whatever its file holds.
NO_FINDINGS = "no findings"


def read_dataset(config: DatasetConfig, problems: list[str] | None = None) -> Sequence[Record]:
    """All records of one dataset in the order of its table, which may be packed.

    Args:
        config: which.
        problems: collects what is wrong with single entries, which are then left out.

    Raises:
        InputError: table missing, not JSON, or of another schema; names file, field and remedy. Or no record
            in it.
    """
    root = locate(config.root)
    if not root.is_dir():
        raise InputError(
            f"The dataset folder {shown(root)} does not exist; check the path of {config.title}."
        )
    if is_packed(root):
        return PackedRecords(config)
    return list(records_of(config, read_table(config.annotation_path, config.kind), problems))


def records_of(config: DatasetConfig, table: Any, problems: list[str] | None = None) -> Iterator[Record]:
    """The records of a dataset that is not packed, one after the other.

    Args:
        config: which.
        table: what `read_table` gives for it.
        problems: as in `read_dataset`.

    Raises:
        InputError: as `read_dataset`.
    """
    path = shown(config.annotation_path)  # for messages
    reader = {
        Kind.SEQUENCE: _read_volumes,
        Kind.VQA: _read_findings,
        Kind.REPORT: _read_findings,
        Kind.CAPTION: _read_captions,
    }.get(config.kind, _read_targets)
    found, names = False, _Names(config)
    for read in reader(config, path, table):
        try:
            record = read()
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
        else:
            found = True
            yield replace(record, name=names.unique(record.name))
    if not found and not problems:
        raise InputError(
            f"{path} holds no samples for {config.kind}; add annotations or leave the dataset out."
        )


def _read_targets(config: DatasetConfig, path: str, table) -> Iterator[Callable[[], Record]]:
    """COCO-like table: one record per annotation, grouped by image in the order of `images`.

    Images and annotations are paired by file name, not by id; images without annotations give no record.
    """
    images = _read_images(_get(table, "images", list, path), path)
    names = list(images)  # see `spelled`
    order = {name: number for number, name in enumerate(names)}
    annotations = _get(table, "annotations", list, path)
    belongs = np.empty(len(annotations), np.int64)
    for number, annotation in enumerate(annotations):
        name = _get(annotation, "file_name", str, path, f"annotations[{number}]")
        if spelled(name) not in order:
            raise InputError(
                f"{path}: annotations[{number}] belongs to the image {name}, which `images` does not list; "
                "add it there."
            )
        belongs[number] = order[spelled(name)]
    del order

    def read(file_name: str, number: int) -> Record:
        where, annotation = f"annotations[{number}]", annotations[number]
        mask_file = _get(annotation, "mask_file", str, path, where)
        size, patient = images[file_name]
        return Record(
            name=mask_file,
            kind=config.kind,
            images=(_file(config.image_folder, file_name, path, where),),
            masks=((_file(config.mask_folder, mask_file, path, where),),),
            texts=_sentences(annotation, path, where),
            size=size,
            augment=config.augment,
            patient=patient,
        )

    for number in np.argsort(belongs, kind="stable").tolist():
        yield partial(read, names[belongs[number]], number)


def _read_findings(config: DatasetConfig, path: str, table) -> Iterator[Callable[[], Record]]:
    """RadGenome's table, an object of samples; lists in abnormality and mask_file are several objects."""
    if not isinstance(table, Mapping):
        raise InputError(f"{path} must be a JSON object whose values are samples, not a {_type_name(table)}.")

    def read(key: str, entry) -> Record:
        where = f"[{key!r}]"
        image_file = _get(entry, "image_file", str, path, where)
        findings = _strings(entry, "abnormality", path, where)
        files = _mask_files(entry, [NO_FINDINGS in finding for finding in findings], path, where)
        if len(findings) != len(files):
            raise InputError(
                f"{path}: {where} has {len(findings)} abnormalities but {len(files)} mask files; give one "
                "mask for each."
            )
        masks = tuple(
            ("" if NO_FINDINGS in finding else _file(config.mask_folder, file, path, where),)
            for finding, file in zip(findings, files, strict=True)
        )
        report = config.kind is Kind.REPORT
        return Record(
            name=f"{image_file}[{key}]",
            kind=config.kind,
            images=(_file(config.image_folder, image_file, path, where),),
            masks=masks,
            texts=findings,
            anatomy="" if report else _text(entry, "anatomy", path, where),
            report=_get(entry, "report", str, path, where) if report else "",
            size=_size(entry, path, where),
            augment=config.augment,
            patient=_patient(entry),
        )

    for key, entry in table.items():
        yield partial(read, key, entry)


def _read_volumes(config: DatasetConfig, path: str, table) -> Iterator[Callable[[], Record]]:
    """Volumes with expressions: one record per volume and expression, with the slices that have a mask of it.

    A mask belongs to the slice whose name without ending, followed by an underscore, begins the mask's name;
    to the longest such name. A mask of no slice, or a second one of a slice, raises InputError.
    """

    def read(volume: str, entry: dict, slices: dict[str, str], key: str, expression) -> Record:
        where = f"volumes[{volume!r}].expressions[{key!r}]"
        text = _text(expression, "exp", path, where)
        masks: dict[str, str] = {}
        for file in _strings(expression, "mask_file", path, where):
            stem = owner(spelled(Path(file).name), slices)
            if stem is None:
                raise InputError(
                    f"{path}: {where} has the mask {file}, which is not named after one of the slices "
                    "(<slice>_<target>.png); rename it or take it out."
                )
            if stem in masks:
                raise InputError(
                    f"{path}: {where} has two masks for the slice {slices[stem]} ({masks[stem]}, {file}); "
                    "merge them into one file."
                )
            masks[stem] = file
        if not masks:
            raise InputError(f"{path}: {where} has no masks; add them or remove the expression.")
        drawn = [stem for stem in slices if stem in masks]
        return Record(
            name=f"{volume}/{text}",
            kind=config.kind,
            images=tuple(
                _file(config.image_folder, f"{volume}/{slices[stem]}", path, where) for stem in drawn
            ),
            masks=(tuple(_file(config.mask_folder, masks[stem], path, where) for stem in drawn),),
            texts=(text,),
            size=_size(entry, path, f"volumes[{volume!r}]"),
            slices=config.slices,
            augment=config.augment,
            patient=_patient(entry),
        )

    for volume, entry in _get(table, "volumes", dict, path).items():
        where = f"volumes[{volume!r}]"
        names = sorted(_strings(entry, "slices", path, where), key=by_number)
        slices = {spelled(Path(name).stem): name for name in names}
        if len(slices) < len(names):
            raise InputError(f"{path}: two slices of {where} have one name without its ending; rename one.")
        expressions = _get(entry, "expressions", dict, path, where)
        for key in sorted(expressions):
            yield partial(read, volume, entry, slices, key, expressions[key])


def owner(mask: str, stems: Container[str]) -> str | None:
    """Which of the images' stems a mask's file name begins with, up to an underscore; the longest one."""
    parts = mask.split("_")
    starts = ("_".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((start for start in starts if start in stems), None)


def _read_captions(config: DatasetConfig, path: str, table) -> Iterator[Callable[[], Record]]:
    """Image-text pairs, one record per annotation; `question`, where present, replaces the task's own."""
    annotations = _get(table, "annotations", list, path)
    images = _read_images(_get(table, "images", list, path) if "images" in table else [], path)

    def read(number: int, annotation) -> Record:
        where = f"annotations[{number}]"
        file_name = _get(annotation, "file_name", str, path, where)
        size, patient = images.get(spelled(file_name), ((0, 0), ""))
        return Record(
            name=file_name,
            kind=config.kind,
            images=(_file(config.image_folder, file_name, path, where),),
            texts=(_text(annotation, "caption", path, where),),
            question=_text(annotation, "question", path, where) if "question" in annotation else "",
            size=size,
            augment=config.augment,
            patient=patient,
        )

    for number, annotation in enumerate(annotations):
        yield partial(read, number, annotation)


def _read_images(images: list, path: str) -> dict[str, tuple[tuple[int, int], str]]:
    """Size and patient of every listed image, by its file name; one may be listed twice if both agree."""
    known: dict[str, tuple[tuple[int, int], str]] = {}
    entries: dict[tuple, tuple] = {}  # many are the same
    for number, image in enumerate(images):
        where = f"images[{number}]"
        name = _get(image, "file_name", str, path, where)
        entry = (_size(image, path, where), _patient(image))
        entry = entries.setdefault(entry, entry)
        if known.setdefault(spelled(name), entry) != entry:
            raise InputError(
                f"{path}: {where} is a second {name} of another size or patient; give every image a name of "
                "its own."
            )
    return known


def _file(folder: Path, name: str, path: str, where: str) -> str:
    """A file that a table names, as it is spelled on disk."""
    if "\0" in name:
        raise InputError(f"{path}: {where} names a file {shown(name)}, as none can be called; mend the name.")
    return find_file(folder / name)


class _Names:
    """Names that say where a record comes from; a repeated one gets a number."""

    def __init__(self, config: DatasetConfig):
        self.prefix = f"{config.title}:{config.split}"
        self.seen: dict[str, int] = {}

    def unique(self, name: str) -> str:
        self.seen[name] = self.seen.get(name, 0) + 1
        count = self.seen[name]
        return f"{self.prefix}/{name}" + (f"#{count}" if count > 1 else "")


def read_table(path: Path, kind: Kind) -> Any:
    """The content of a table for a task; its entries lie on a disk until they are asked for.

    Raises:
        InputError: it is missing or not JSON.
    """
    if not path.is_file():
        raise InputError(
            f"{shown(path)} does not exist; a dataset needs this table (`unibiomed data build` writes it)."
        )
    try:
        return read_members(path, depth=1 if kind in (Kind.VQA, Kind.REPORT) else 2)
    except (ValueError, RecursionError):
        return read_json(path, unique_keys=True)  # which says what is wrong, or holds no object


def _get(entry, key: str, expected: type, path: str, where: str = "the table"):
    if not isinstance(entry, Mapping):
        raise InputError(
            f"{path}: {where} must be an object with the field {key!r}, not a {_type_name(entry)}."
        )
    if key not in entry:
        raise InputError(
            f"{path}: {where} lacks the field {key!r}; see docs/train_on_your_data.md for the schema."
        )
    value = entry[key]
    if not isinstance(value, _SPILLED.get(expected, expected)):
        raise InputError(
            f"{path}: {key!r} of {where} must be a {_JSON_NAMES[expected]}, not a {_type_name(value)}."
        )
    return value


def _text(entry, key: str, path: str, where: str) -> str:
    text = _get(entry, key, str, path, where)
    if not text.strip().strip("."):
        raise InputError(
            f"{path}: {key!r} of {where} is empty; write what the image shows, or remove the entry."
        )
    return text


def _strings(entry, key: str, path: str, where: str) -> tuple[str, ...]:
    if isinstance(entry, dict) and isinstance(entry.get(key), list):
        entry = {f"{key}[{number}]": value for number, value in enumerate(entry[key])}
        return tuple(_text(entry, name, path, where) for name in entry)
    return (_text(entry, key, path, where),)


def _mask_files(entry: dict, healthy: list[bool], path: str, where: str) -> tuple[str, ...]:
    """The mask file of every finding; where there is no finding none is needed."""
    files = entry.get("mask_file")
    if all(healthy) and not files:
        return ("",) * len(healthy)
    if not isinstance(files, list) or len(files) != len(healthy):
        return _strings(entry, "mask_file", path, where)
    named = {f"mask_file[{number}]": file for number, file in enumerate(files)}
    return tuple(
        "" if none and not named[name] else _text(named, name, path, where)
        for name, none in zip(named, healthy, strict=True)
    )


def _sentences(annotation, path: str, where: str) -> tuple[str, ...]:
    sentences = _get(annotation, "sentences", list, path, where)
    if not sentences:
        raise InputError(f"{path}: 'sentences' of {where} is empty; give at least one name of the target.")
    return tuple(
        _text(sentence, "raw", path, f"{where}.sentences[{number}]")
        for number, sentence in enumerate(sentences)
    )


def _size(entry: dict, path: str, where: str) -> tuple[int, int]:
    """(width, height), or (0, 0) where the entry does not say."""
    for key in ("width", "height"):
        value = entry.get(key) or 0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or value != int(value):
            raise InputError(f"{path}: {key!r} of {where} is {value!r}; give a whole number of pixels.")
    width, height = (int(entry.get(key) or 0) for key in ("width", "height"))
    return (width, height) if width and height else (0, 0)


def _patient(entry: dict) -> str:
    patient = entry.get("patient")
    return "" if patient is None else str(patient)


_JSON_NAMES = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean",
               SpilledObject: "object", Spilled: "list"}  # fmt: skip
_SPILLED = {dict: (dict, SpilledObject), list: (list, Spilled)}


def _type_name(value) -> str:
    return _JSON_NAMES.get(type(value), "null")
