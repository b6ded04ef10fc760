"""Records of a dataset in our own format (docs/train_on_your_data.md), every task of it asked once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from unibiomed_jax.data.files import image_size
from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.packed import is_packed
from unibiomed_jax.data.prompts import PromptConfig, questions
from unibiomed_jax.data.records import DatasetConfig, Kind, Record, without_place
from unibiomed_jax.data.tables import records_of
from unibiomed_jax.data.transforms import load_mask
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.records import Sample, encode_masks
from unibiomed_jax.evaluation.reference_samples import read_spacing
from unibiomed_jax.files import locate, read_json, shown, spelled
from unibiomed_jax.inputs.images import by_number
from unibiomed_jax.inputs.prompt import IMAGE

# As UniBiomed's scripts ask: about regions, reports and captions there is a newline behind the image.
_PROMPTS = PromptConfig(newline_after_image=False)
_PROMPTS_WITH_NEWLINE = PromptConfig(newline_after_image=True)
TASK_OF_KIND = {
    Kind.SEGMENTATION: "seg2d",
    Kind.SEQUENCE: "seg3d",
    Kind.DISEASE: "disease",
    Kind.REGION: "region",
    Kind.VQA: "gvqa",
    Kind.REPORT: "report",
    Kind.CAPTION: "caption",
}
_NEWLINE = ("region", "report", "caption", "vqa")


def read_own_format(
    data: Path, split: str, tasks: Sequence[str], datasets: Sequence[str] = ()
) -> list[Sample]:
    """The records of all datasets of a folder, those of one image behind each other.

    The words for a target are the same in every run: `Please segment TARGET.`, or for other tasks one of the
    task's questions that the record's name draws. The truth of a region is the region that is shown. A record
    whose files cannot be used comes with the reason.

    Args:
        data: folder.
        split: which tables.
        tasks: of these, or of all.
        datasets: names of their folders; all, if there are none.

    Raises:
        InputError: the folder has no such records, or a table is wrong.
    """
    data = locate(data)
    found: list[Sample] = []
    configs = find_datasets(data, split, balance_to=0, repeats=1)
    unknown = set(datasets) - {Path(config.root).name for config in configs}
    if unknown:
        raise InputError(
            f"{shown(data)} has no dataset {', '.join(map(shown, sorted(unknown)))} with a split {split!r}; "
            "correct --datasets."
        )
    for config in configs:
        if datasets and Path(config.root).name not in datasets:
            continue
        if is_packed(config.annotation_path.parent):
            raise InputError(
                f"{shown(config.root)} is packed; evaluate the folder that it was packed from, --data FOLDER."
            )
        table = read_json(config.annotation_path, unique_keys=True)
        found += [
            sample for sample in read_table_records(config, data, table) if not tasks or sample.task in tasks
        ]
    missing = [task for task in tasks if not any(sample.task == task for sample in found)]
    if missing or not found:
        raise InputError(
            f"{shown(data)} has no record of {', '.join(missing) or 'any task'} in the split {split!r}; "
            "correct --data, --split or --task."
        )
    return sorted(found, key=lambda sample: (sample.dataset, sample.image))


def read_table_records(config: DatasetConfig, data: Path, table: Any) -> Iterator[Sample]:
    """The records of one dataset's table in a folder `data` of datasets.

    Raises:
        InputError: the table is damaged.
    """
    problems: list[str] = []
    records = list(records_of(config, table, problems))
    if problems:
        more = f" ({len(problems)} such entries)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    rows = _rows(config, table)
    inside = PurePosixPath(str(locate(config.root).relative_to(data)))
    for record in records:
        yield _sample(config, record, rows, inside, "" if inside.name else data.resolve().name)


def _sample(
    config: DatasetConfig, record: Record, rows: dict[str, Any], inside: PurePosixPath, alone: str
) -> Sample:
    """`inside`: the dataset's folder from that of all; `alone`: its name, where it is the only one."""
    volume = record.kind is Kind.SEQUENCE
    local = without_place(record, config)
    task = _task(record)
    image = PurePosixPath(str(local.images[0]))
    # Slices may lie in folders below their volume's.
    place = next(path for path in image.parents if spelled(str(path)) in rows) if volume else image
    row = rows.get(spelled(str(place)), {})
    slices = tuple(sorted(row["slices"], key=by_number)) if volume else ()
    truths, reason = (), None
    if record.masks:
        try:
            truths = encode_masks(_volume(record, local, place, slices) if volume else _masks(record))
        except InputError as error:
            reason = str(error)
    return Sample(
        task,
        str(inside / local.name),
        _question(task, record),
        answer=_answer(task, record),
        category="" if task in ("report", "caption", "vqa") else record.texts[0],
        dataset=alone or str(inside),
        patient=record.patient or None,
        image=str(inside / place),
        slices=slices,
        spacing=read_spacing(row, 3 if volume else 2, config.annotation_path),
        truth_masks=truths,
        reason=reason,
    )


def _task(record: Record) -> str:
    if record.kind is Kind.CAPTION:
        return "vqa" if record.question else "caption"
    return TASK_OF_KIND[record.kind]


def _question(task: str, record: Record) -> str:
    if task in ("seg2d", "seg3d"):
        return f"{IMAGE}Please segment {record.texts[0].removesuffix('.')}."
    asked = questions(record, record.texts[:1], _PROMPTS_WITH_NEWLINE if task in _NEWLINE else _PROMPTS)
    return asked[int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:4], "big") % len(asked)]


def _answer(task: str, record: Record) -> str | None:
    """What should be said, without marks of phrases and masks."""
    if task in ("seg2d", "seg3d"):
        return None
    if task in ("gvqa", "report"):
        findings = ". ".join(record.texts)
        return f"{findings}. {record.report}" if task == "report" else findings
    return record.texts[0]


def _masks(record: Record) -> list[np.ndarray]:
    size = image_size(record)
    return [load_mask(file, size, record.name) for (file,) in record.masks]


def _volume(record: Record, local: Record, place: PurePosixPath, slices: Sequence[str]) -> list[np.ndarray]:
    """The one mask of all slices; those that have no file of it are empty."""
    size = image_size(record)
    # Files are named as on disk, slices as in the table.
    names = [spelled(str(PurePosixPath(str(image)).relative_to(place))) for image in local.images]
    files = dict(zip(names, record.masks[0], strict=True))
    return [np.stack([load_mask(files.get(spelled(name), ""), size, record.name) for name in slices])]


def _rows(config: DatasetConfig, table: Any) -> dict[str, Any]:
    """What a table says about its images and volumes, by their path from the dataset's folder."""
    root = locate(config.root)
    folder = PurePosixPath(str(config.image_folder.relative_to(root)))
    if config.kind is Kind.SEQUENCE:
        named = table["volumes"].items()
    elif config.kind in (Kind.VQA, Kind.REPORT):
        named = [(entry["image_file"], entry) for entry in table.values()]
    else:
        named = [(image["file_name"], image) for image in table.get("images", ())]
    return {spelled(str(folder / name)): row for name, row in named}
