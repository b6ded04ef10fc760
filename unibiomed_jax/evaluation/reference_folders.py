"""Datasets and predictions in the folders of UniBiomed's scripts, read for scoring and written for them.

| task | table, truth | predictions |
|---|---|---|
| seg2d | `SPLIT.json`, `SPLIT_mask/MASK_FILE` | `SPLIT/MASK_FILE` |
| seg3d | `meta_SPLIT.json`, its mask files | `VOLUME/EXPRESSION/SLICE` |
| seg3d, stand-alone script | no table, `A-B-SLICE_LABEL.png` of the volume A-B | equal names |
| disease, gvqa, report, caption | as seg2d | `IMAGE.json`: caption, phrases, masks |
| region | in the predictions | `region_cap_pred_accuracy-*.json` |
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.paper_masks import ImageItem, MaskItem, VolumePair
from unibiomed_jax.evaluation.paper_text import TextItem
from unibiomed_jax.evaluation.repairs import Repairs
from unibiomed_jax.files import read_json, shown, write_beside
from unibiomed_jax.masks import run_length

REGION_FILES = "region_cap_pred_accuracy-*.json"
# The script of volumes brings every slice to this size.
_SIDE = 512


@dataclass
class GroundedItems:
    """What there is to score of a grounded task, in the table's order."""

    images: list[ImageItem] = field(default_factory=list)
    texts: list[TextItem] = field(default_factory=list)
    # Why an image has no text to score.
    unscored: dict[str, str] = field(default_factory=dict)


def read_seg2d(data: Path, predictions: Path, split: str) -> Iterator[MaskItem]:
    """The masks of a table in its order.

    Raises:
        InputError: the table or a mask cannot be used.
    """
    for annotation in read_rows(read_table(data / f"{split}.json"), "annotations", data / f"{split}.json"):
        name, target = read_field(annotation, "mask_file"), read_sentence(annotation, "sent")
        predicted = predictions / split / name
        yield MaskItem(
            name,
            target,
            truth=read_values(data / f"{split}_mask" / name),
            predicted=read_values(predicted) if predicted.exists() else None,
        )


def read_seg3d(data: Path, predictions: Path, split: str) -> Iterator[MaskItem]:
    """The expressions of every volume of a table, in the slices that have a truth mask.

    Raises:
        InputError: as `read_seg2d`.
    """
    table = data / f"meta_{split}.json"
    volumes = read_table(table).get("volumes")
    if not isinstance(volumes, dict):
        raise InputError(f"{shown(table)} has no 'volumes'; it is no table of volumes.")
    for volume, content in volumes.items():
        for expression in content["expressions"].values():
            target = expression["exp"]
            files = [predictions / volume / target / Path(name).name for name in expression["img_file"]]
            yield MaskItem(
                volume,
                target,
                truth=[read_values(data / name) for name in expression["mask_file"]],
                predicted=[read_values(file) if file.exists() else None for file in files],
            )


def read_grounded(task: str, data: Path, predictions: Path, split: str, repairs: Repairs) -> GroundedItems:
    """Images and texts of a table of disease, gvqa, report or caption.

    A text is scored if its image has a prediction and exactly one annotation, whose caption is not null.

    Raises:
        InputError: as `read_seg2d`; or the reference could not read the table, and repairs are not allowed.
    """
    path = data / f"{split}.json"
    table = read_table(path)
    images = read_rows(table, "images", path)
    by_image: dict[Any, list[dict]] = {image["id"]: [] for image in images}
    for annotation in read_rows(table, "annotations", path):
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    has_masks = task != "caption"
    _check_categories(table, path, has_masks, repairs)
    found, seen = GroundedItems(), set()
    for image in images:
        name, annotations = read_field(image, "file_name"), by_image[image["id"]]
        caption, masks = read_answer(predictions / f"{stem_of(name)}.json")
        if has_masks:
            truths = [
                read_values(data / f"{split}_mask" / read_field(annotation, "mask_file"))
                for annotation in annotations
            ]
            if task == "disease":
                truths = [truth if truth.ndim == 2 else truth[..., 0] for truth in truths]
            found.images.append(ImageItem(str(image["id"]), truths, masks))
        if image["id"] in seen:
            continue
        seen.add(image["id"])
        try:
            truth, reason = _truth(task, name, annotations, caption, repairs)
        except KeyError as error:
            raise InputError(
                f"An annotation of {shown(name)} has no {error}; correct {shown(path)}."
            ) from None
        if truth is None or caption is None:
            found.unscored[name] = reason
        else:
            found.texts.append(TextItem(str(image["id"]), truth, caption))
    return found


def _check_categories(table: dict, path: Path, has_masks: bool, repairs: Repairs) -> None:
    if "categories" not in table:
        if has_masks:
            repairs.repair(
                f"{path} has no list of categories", reference="stops with KeyError", instead="do without"
            )
    elif any("category_id" not in annotation for annotation in table["annotations"]):
        repairs.repair(
            f"{path} has categories and annotations without category_id",
            reference="stops with KeyError",
            instead="do without",
        )


def _truth(
    task: str, name: str, annotations: Sequence[dict], caption: str | None, repairs: Repairs
) -> tuple[str | None, str]:
    """What should have been said about an image, or None and why its text is not scored."""
    if caption is None:
        return None, "no prediction, or one that cannot be read"
    if len(annotations) != 1:
        return None, f"{len(annotations)} annotations instead of one"
    (annotation,) = annotations
    if task == "disease":
        return f"{read_sentence(annotation, 'raw')}.", ""
    if "caption" not in annotation:
        repairs.repair(
            f"The annotation of {name} has no caption",
            reference="stops with KeyError",
            instead="leave it out",
        )
        return None, "no caption in the table"
    if annotation["caption"] is None:
        return None, "the caption in the table is null"
    return (f"{annotation['abnormality']}." if task == "gvqa" else annotation["caption"]), ""


def read_answer(path: Path) -> tuple[str | None, list[np.ndarray]]:
    """Caption and masks of a prediction; None and no masks if there is none that the reference would read.

    The answer may lie under a single key. One without masks is an answer in words alone.

    Raises:
        InputError: a mask in it is damaged.
    """
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        if "caption" not in answer:
            answer = next(iter(answer.values()))
        caption, masks = answer["caption"], answer.get("pred_masks") or []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None, []
    return caption, [run_length.decode(mask, shown(path)) for mask in masks]


def read_regions(predictions: Path) -> list[TextItem]:
    """What was said about regions: every file of the folder (each process of the reference wrote one)."""
    files = [predictions] if predictions.is_file() else sorted(predictions.glob(REGION_FILES))
    if not files:
        raise InputError(f"{shown(predictions)} holds no {REGION_FILES}; correct --predictions.")
    return [
        TextItem(str(item["image_id"]), item["answer"], item["prediction"])
        for file in files
        for item in read_json(file)
    ]


def read_volumes(truth: Path, predictions: Path) -> tuple[Iterator[VolumePair], list[str]]:
    """The volumes of two folders of slices `A-B-SLICE_LABEL.png`, and the predicted files without truth.

    Raises:
        InputError: a file is no image, or not named like that.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    without_truth = []
    for path in sorted(predictions.glob("*.png")):
        if not (truth / path.name).exists():
            without_truth.append(path.name)
            continue
        fields, (_, separator, label) = path.name.split("-"), path.stem.rpartition("_")
        if len(fields) < 3 or not separator:
            raise InputError(f"{shown(path)} is not named A-B-SLICE_LABEL.png, so its volume is not known.")
        groups.setdefault((label, "-".join(fields[:2])), []).append(path.name)
    pairs = (
        VolumePair(target, volume, _stack(predictions, names), _stack(truth, names))
        for (target, volume), names in groups.items()
    )
    return pairs, without_truth


def _stack(folder: Path, names: Sequence[str]) -> np.ndarray:
    slices = []
    for name in names:
        with _open(folder / name) as image:
            slices.append(np.asarray(image.convert("L").resize((_SIDE, _SIDE))) > 0)
    return np.stack(slices)


def read_values(path: Path) -> np.ndarray:
    """The values of a mask file, (height, width) or (height, width, channels).

    Raises:
        InputError: it is missing or cannot be read as an image.
    """
    with _open(path) as image:
        return np.asarray(image)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.load()
        return image
    except FileNotFoundError:
        raise InputError(f"{shown(path)} is missing; copy it again, or correct the table.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be read as an image ({error}); copy it again.") from None


def write_mask(path: Path, mask: np.ndarray) -> None:
    """A mask of seg2d (`SPLIT/MASK_FILE`) or a slice of seg3d (`VOLUME/EXPRESSION/SLICE`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda file: Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG"))


def write_answer(
    folder: Path, file_name: str, caption: str, phrases: Sequence[str], masks: Sequence[np.ndarray] | None
) -> None:
    """The answer about an image; without `masks` as captions have none, with an empty list as lost ones."""
    stem = stem_of(file_name)
    answer: dict = {"image_id": stem, "caption": caption, "phrases": list(phrases)}
    if masks is not None:
        answer["pred_masks"] = [run_length.encode(mask) for mask in masks]
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / f"{stem}.json", json.dumps(answer).encode("utf-8"))


def write_regions(folder: Path, items: Sequence[TextItem], accuracy: float) -> None:
    """What was said about regions, with the accuracy in the file's name."""
    content = [{"image_id": item.name, "answer": item.truth, "prediction": item.predicted} for item in items]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REGION_FILES.replace("*", str(accuracy))
    write_beside(path, json.dumps(content).encode("utf-8"))


def stem_of(file_name: str) -> str:
    """An image's name without its last four characters, which the reference takes for its ending."""
    return PurePosixPath(file_name).name[:-4]


def read_table(path: Path) -> dict:
    """A JSON object.

    Raises:
        InputError: the file holds none.
    """
    table = read_json(path, remedy="correct --data or --split")
    if not isinstance(table, dict):
        raise InputError(
            f"{shown(path)} is a list, no table with 'images' and 'annotations'; correct --data."
        )
    return table


def read_rows(table: dict, key: str, path: Path) -> list[dict]:
    """The images or annotations of a table.

    Raises:
        InputError: it has no such list.
    """
    rows = table.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{shown(path)} has no list of {key}; correct --data.")
    return rows


def read_field(row: dict, key: str) -> str:
    """A text of a row.

    Raises:
        InputError: it is missing.
    """
    if not isinstance(row.get(key), str):
        raise InputError(f"The entry {row.get('id')!r} of the table has no {key}; correct the table.")
    return row[key]


def read_sentence(annotation: dict, key: str) -> str:
    """The first sentence about a mask, `raw` or as it is asked for (`sent`).

    Raises:
        InputError: there is none.
    """
    try:
        return annotation["sentences"][0][key]
    except (LookupError, TypeError):
        raise InputError(
            f"The annotation {annotation.get('id')!r} of the table has no sentence; correct the table."
        ) from None
