"""Predictions in the folders of UniBiomed's scripts as records, for the strict protocol.

Nothing is left out: all masks of a table instead of its first 300, all slices of a volume instead of those
with a truth. A table may say more than the reference's do: `patient` and `spacing` (mm) of an image or a
volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.records import EncodedMasks, Sample, encode_masks
from unibiomed_jax.evaluation.reference_folders import (
    read_answer,
    read_field,
    read_regions,
    read_rows,
    read_sentence,
    read_table,
    read_values,
    stem_of,
)
from unibiomed_jax.evaluation.tasks import TASKS
from unibiomed_jax.inputs.images import by_number

NO_FILE = "no prediction, or one that cannot be read"


def read_samples(task: str, data: Path, predictions: Path, split: str) -> list[Sample]:
    """The records of a task.

    Raises:
        InputError: a file cannot be used, or this task has no folders.
    """
    readers = {"seg2d": _seg2d, "seg3d": _seg3d, "region": _region}
    reader = readers.get(task, _grounded)
    if task not in TASKS or task == "vqa":
        raise InputError(
            f"There are no prediction folders of {task}; write its records as samples_{task}.jsonl."
        )
    samples = list(reader(task, data, predictions, split))
    if not samples:
        raise InputError(f"{data} holds nothing to score for {task}; correct --data or --split.")
    by_id: set[str] = set()
    for sample in samples:
        if sample.doc_id in by_id:
            raise InputError(f"The table in {data} lists {sample.doc_id} twice; list it once.")
        by_id.add(sample.doc_id)
    return samples


def _seg2d(task: str, data: Path, predictions: Path, split: str) -> Iterator[Sample]:
    path = data / f"{split}.json"
    table = read_table(path)
    images = {image.get("file_name"): image for image in table.get("images", [])}
    for annotation in read_rows(table, "annotations", path):
        name, target = read_field(annotation, "mask_file"), read_sentence(annotation, "sent")
        predicted = predictions / split / name
        image = images.get(annotation.get("file_name"), {})
        yield Sample(
            task,
            name,
            f"Please segment {target}.",
            category=target,
            dataset=data.name,
            patient=_patient(image),
            image=annotation.get("file_name", ""),
            spacing=read_spacing(image, 2, path),
            truth_masks=encode_masks([_mask(data / f"{split}_mask" / name)]),
            masks=encode_masks([_mask(predicted)]) if predicted.exists() else (),
            reason=None if predicted.exists() else NO_FILE,
        )


def _seg3d(task: str, data: Path, predictions: Path, split: str) -> Iterator[Sample]:
    path = data / f"meta_{split}.json"
    for volume, content in read_table(path).get("volumes", {}).items():
        names = sorted(content["slices"], key=by_number)
        for expression in content["expressions"].values():
            target = expression["exp"]
            of_slice = {
                Path(image).name: data / mask
                for image, mask in zip(expression["img_file"], expression["mask_file"], strict=True)
            }
            files = [predictions / volume / target / name for name in names]
            there = all(file.exists() for file in files)
            yield Sample(
                task,
                f"{volume}/{target}",
                f"Please segment {target}.",
                category=target,
                dataset=data.name,
                patient=_patient(content) or volume,
                image=volume,
                slices=tuple(names),
                spacing=read_spacing(content, 3, path),
                truth_masks=_stack([of_slice.get(name) for name in names], f"{volume}, {target}"),
                masks=_stack(files, f"the prediction of {volume}, {target}") if there else (),
                reason=None if there else "slices without a prediction",
            )


def _grounded(task: str, data: Path, predictions: Path, split: str) -> Iterator[Sample]:
    path = data / f"{split}.json"
    table = read_table(path)
    of_image: dict[Any, list[dict]] = {}
    for annotation in read_rows(table, "annotations", path):
        of_image.setdefault(annotation.get("image_id"), []).append(annotation)
    for image in read_rows(table, "images", path):
        name, annotations = read_field(image, "file_name"), of_image.get(image.get("id"), [])
        caption, masks = read_answer(predictions / f"{stem_of(name)}.json")
        first = annotations[0] if len(annotations) == 1 else {}
        answer = first.get({"gvqa": "abnormality"}.get(task, "caption"))
        if task == "disease" and first:
            answer = read_sentence(first, "raw")
        files = (
            [read_field(annotation, "mask_file") for annotation in annotations] if TASKS[task].masks else []
        )
        truths = [_mask(data / f"{split}_mask" / file) for file in files]
        yield Sample(
            task,
            str(image.get("id")),
            "",
            answer=answer,
            prediction=caption,
            category=read_sentence(annotations[0], "raw") if task == "disease" and annotations else "",
            dataset=data.name,
            patient=_patient(image),
            image=name,
            spacing=read_spacing(image, 2, path),
            truth_masks=encode_masks(truths),
            masks=encode_masks(masks) if TASKS[task].masks else (),
            reason=NO_FILE if caption is None else None,
        )


def _region(task: str, data: Path, predictions: Path, split: str) -> Iterator[Sample]:
    del split  # the predictions hold their truth
    for item in read_regions(predictions):
        target = item.truth.split(" in ")[0]
        yield Sample(
            task, item.name, "", item.truth, prediction=item.predicted, category=target, dataset=data.name
        )


def _patient(row: dict) -> str | None:
    return str(row["patient"]) if row.get("patient") not in (None, "") else None


def read_spacing(row: dict, axes: int, path: Path) -> tuple[float, ...] | None:
    spacing = row.get("spacing")
    if spacing is None:
        return None
    try:
        sizes = tuple(float(size) for size in spacing)
    except (TypeError, ValueError):
        sizes = ()
    if len(sizes) != axes or not all(0 < size < float("inf") for size in sizes):
        raise InputError(f"{path} has the spacing {spacing}; give {axes} millimetres above 0, or none.")
    return sizes


def _mask(path: Path) -> np.ndarray:
    values = read_values(path)
    return (values if values.ndim == 2 else values[..., 0]) > 0


def _stack(files: list[Path | None], where: str) -> EncodedMasks:
    """The slices of a volume as one mask; one without a file is empty."""
    slices = {number: _mask(file) for number, file in enumerate(files) if file is not None}
    shapes = {piece.shape for piece in slices.values()}
    if len(shapes) != 1:
        raise InputError(f"The slices of {where} have {len(shapes)} sizes; correct the table or the masks.")
    (shape,) = shapes
    return encode_masks([np.stack([slices.get(n, np.zeros(shape, bool)) for n in range(len(files))])])
