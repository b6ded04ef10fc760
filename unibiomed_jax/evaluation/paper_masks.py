"""Masks by the paper's protocol: what UniBiomed's own scripts compute, to the last digit.

Their definitions are not those of the field (small constants in denominators, the first 300 masks alone,
distances of voxels instead of surfaces): they are here to be compared with published numbers. For anything
else there is `strict`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from scipy import ndimage

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.repairs import Repairs

# Masks of a 2D table that are scored; those after them are not.
LIMIT = 300
# Where the reference divides by a count, and where it divides by a number of voxels.
_PER_COUNT, _PER_VOXEL = 1e-6, 1e-8
# Distance in voxels within which surfaces agree.
_TOLERANCE = 2


@dataclass(frozen=True)
class MaskItem:
    """One mask to be scored, with the values that the files hold: whatever is above 0 is inside.

    A volume's arrays are lists, an entry per slice.
    """

    # Its file; of a volume, its name.
    name: str
    # The expression it was asked for by, which is the class it counts for.
    target: str
    truth: Shaped[np.ndarray, "height width"] | Sequence[np.ndarray]
    # None where there is no file.
    predicted: Shaped[np.ndarray, "height width"] | Sequence[np.ndarray | None] | None


@dataclass(frozen=True)
class ImageItem:
    """All masks of one image of a grounded task."""

    name: str
    # As the files hold them: whatever is above 0 is inside.
    truths: Sequence[Shaped[np.ndarray, "height width"]]
    predicted: Sequence[Bool[np.ndarray, "height width"]]


@dataclass(frozen=True)
class VolumePair:
    """One target in one volume, for the stand-alone script of volumes."""

    target: str
    volume: str
    predicted: Bool[np.ndarray, "slices height width"]
    truth: Bool[np.ndarray, "slices height width"]


def seg2d(items: Iterable[MaskItem], repairs: Repairs) -> dict:
    """`results.json` of eval_seg2D: the means, then Dice and IoU of every mask file; {} where truth is empty.

    Of items with one name the last one counts.
    """
    found: dict[str, dict] = {}
    for item in itertools.islice(items, LIMIT):
        predicted, truth = _pair(item.name, item.predicted, item.truth, repairs)
        found[item.name] = _overlap(predicted, truth) | {"exp": item.target} if truth.any() else {}
    return {"mean": _means([scores for scores in found.values() if scores])} | found


def seg3d(items: Iterable[MaskItem], repairs: Repairs) -> dict:
    """`results.json` of eval_seg3D: the means, then Dice and IoU of every expression of every volume.

    Slices come as the table lists them, which are those with a truth mask: what is predicted elsewhere is not
    counted. Expressions with an empty truth are left out.
    """
    found: dict[str, dict[str, dict]] = {}
    for item in items:
        of_volume = found.setdefault(item.name, {})
        where = f"{item.name}, {item.target}"
        pairs = [
            _pair(f"{where}, slice {number}", predicted, truth, repairs)
            for number, (predicted, truth) in enumerate(zip(item.predicted, item.truth, strict=True))
        ]
        if len({truth.shape for _, truth in pairs}) > 1:
            raise InputError(f"{where} has slices of several sizes; its table mixes volumes.")
        predicted, truth = (np.stack(masks) for masks in zip(*pairs, strict=True))
        if truth.any():
            of_volume[item.target] = _overlap(predicted, truth)
    scored = [
        scores | {"exp": target} for of_volume in found.values() for target, scores in of_volume.items()
    ]
    return {"mean": _means(scored)} | found


def resize_linear(
    image: UInt8[np.ndarray, "rows columns"], size: tuple[int, int]
) -> UInt8[np.ndarray, "..."]:
    """OpenCV's resize(INTER_LINEAR) of bytes to `size` = (height, width).

    It computes in integers: weights are multiples of 1/2048, and rows are rounded before they are joined. A
    halving is a mean of four.
    """
    if image.shape == (2 * size[0], 2 * size[1]):
        quarters = image.reshape(size[0], 2, size[1], 2).astype(np.int32)
        return ((quarters.sum((1, 3)) + 2) >> 2).astype(np.uint8)
    left, right, near, far = _taps(image.shape[1], size[1], clamp=True)
    rows = image[:, left].astype(np.int32) * near + image[:, right].astype(np.int32) * far
    top, bottom, near, far = _taps(image.shape[0], size[0], clamp=False)
    rows >>= 4
    parts = (rows[top] * near[:, None] >> 16) + (rows[bottom] * far[:, None] >> 16)
    return (parts + 2 >> 2).astype(np.uint8)


def _taps(size_in: int, size_out: int, clamp: bool) -> tuple[np.ndarray, ...]:
    """Of every output cell the two input cells it lies between, and the weights of both in 1/2048.

    With `clamp`, what lies beyond the outermost centres has the whole weight on them.
    """
    place = ((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5).astype(np.float32)
    cell = np.floor(place).astype(np.int64)
    share = place - cell.astype(np.float32)
    if clamp:
        share[(cell < 0) | (cell >= size_in - 1)] = 0
    weights = [np.rint(weight * 2048).astype(np.int32) for weight in (1 - share, share)]
    return np.clip(cell, 0, size_in - 1), np.clip(cell + 1, 0, size_in - 1), *weights


def _pair(
    where: str, predicted: np.ndarray | None, truth: np.ndarray, repairs: Repairs
) -> tuple[Bool[np.ndarray, "height width"], Bool[np.ndarray, "height width"]]:
    """Prediction and truth as the reference compares them: the truth brought to the prediction's size."""
    truth = truth if truth.ndim == 2 else truth[..., 0]
    if predicted is None:
        repairs.repair(
            f"{where} has no prediction",
            reference="stops with FileNotFoundError",
            instead="count it as an empty mask",
        )
        predicted = np.zeros(truth.shape, np.uint8)
    if predicted.ndim != 2:
        repairs.repair(
            f"The prediction of {where} is a colour image",
            reference="stops with ValueError",
            instead="take its first channel",
        )
        predicted = predicted[..., 0]
    if predicted.shape != truth.shape:
        if truth.dtype != np.uint8:
            repairs.repair(
                f"The truth of {where} has values of type {truth.dtype} and another size than its prediction",
                reference="stops with an error of OpenCV or resizes them in other ways",
                instead="take them as black and white",
            )
            truth = (truth > 0).astype(np.uint8) * 255
        truth = resize_linear(truth, predicted.shape)
    return predicted > 0, truth > 0


def _overlap(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    both = int((predicted & truth).sum())
    total = int(predicted.sum()) + int(truth.sum())
    return {"dice": 2 * both / total, "IoU": both / (total - both)}


def _means(scored: Sequence[dict]) -> dict:
    """Means of the classes, over the classes, and over all masks, each a little too small."""
    targets = list(dict.fromkeys(scores["exp"] for scores in scored))
    means: dict = {}
    for target in targets:
        of_target = [scores for scores in scored if scores["exp"] == target]
        means[target] = {
            name: sum(scores[name] for scores in of_target) / (len(of_target) + _PER_COUNT)
            for name in ("dice", "IoU")
        }
    classes, count = len(targets), len(scored)
    over_classes = {
        f"mean_class_{name.lower()}": sum(means[target][name] for target in targets) / (classes + _PER_COUNT)
        for name in ("dice", "IoU")
    }
    over_masks = {
        f"mean_{name.lower()}": sum(scores[name] for scores in scored)
        * classes
        / (classes * count + _PER_COUNT)
        for name in ("dice", "IoU")
    }
    return means | over_classes | over_masks


def mean_dice(images: Iterable[ImageItem], repairs: Repairs) -> tuple[float, dict[str, float]]:
    """The grounded tasks' mDice, and the Dice of every image.

    Of an image, predictions and truths are paired greedily, the best first; masks without a partner do not
    count, an image without a pair is 0. An image that the table lists twice counts twice.
    """
    images = list(images)
    if not any(image.predicted for image in images):
        repairs.repair(
            "No prediction holds a mask", reference="stops with IndexError", instead="count every image as 0"
        )
    scores = [(image.name, _matched_dice(image, repairs)) for image in images]
    return float(np.mean([score for _, score in scores])) if scores else 0.0, dict(scores)


def _matched_dice(image: ImageItem, repairs: Repairs) -> float:
    truths = [_one_channel(image.name, truth, repairs) for truth in image.truths]
    table = np.zeros((len(image.predicted), len(truths)))
    for row, predicted in enumerate(image.predicted):
        for column, truth in enumerate(truths):
            if predicted.shape != truth.shape:
                repairs.repair(
                    f"{image.name} has masks of {_size(predicted)} and {_size(truth)} pixels",
                    reference="stops with ValueError or compares what does not belong together",
                    instead="resize the prediction to the truth",
                )
                predicted = resize_nearest(predicted, truth.shape)
            total = int(predicted.sum()) + int(truth.sum())
            table[row, column] = 2.0 * int((predicted & truth).sum()) / total if total else 1.0
    taken: list[float] = []
    while table.size and table.max() > 0:
        row, column = np.unravel_index(table.argmax(), table.shape)
        taken.append(float(table[row, column]))
        table = np.delete(np.delete(table, row, 0), column, 1)
    return float(np.mean(taken)) if taken else 0.0


def _one_channel(name: str, truth: np.ndarray, repairs: Repairs) -> Bool[np.ndarray, "height width"]:
    if truth.ndim == 3:
        repairs.repair(
            f"A truth mask of {name} is a colour image",
            reference="stops with ValueError or compares what does not belong together",
            instead="take its first channel",
        )
        truth = truth[..., 0]
    return truth > 0


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at `size` = (height, width), each pixel that of the cell in which its centre lies."""
    rows, columns = (
        ((np.arange(length) + 0.5) * (given / length)).astype(np.int64)
        for given, length in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns]


def _size(mask: np.ndarray) -> str:
    return f"{mask.shape[1]}x{mask.shape[0]}"


def volumes(pairs: Iterable[VolumePair], repairs: Repairs) -> dict:
    """What cal_3d_metrics prints: Dice, HD95 and NSD in voxels, of every volume, target, and over targets.

    A volume with one empty mask has no HD95 (NaN), and then the target and the whole have none either.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for pair in pairs:
        found.setdefault(pair.target, {})[pair.volume] = _volume_scores(pair, repairs)
    everywhere = list(dict.fromkeys(volume for of_target in found.values() for volume in of_target))
    for target, of_target in found.items():
        if missing := [volume for volume in everywhere if volume not in of_target]:
            repairs.repair(
                f"{target} is missing in {', '.join(missing)}",
                reference="stops with ValueError",
                instead="take the mean over the other volumes",
            )
    means = {target: _mean_scores(of_target.values()) for target, of_target in found.items()}
    return {"mean": _mean_scores(means.values()), "targets": means, "volumes": found}


def _mean_scores(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    scores = list(scores)
    return {name: float(np.mean([each[name] for each in scores])) for name in ("dice", "nsd", "hd95")}


def _volume_scores(pair: VolumePair, repairs: Repairs) -> dict[str, float]:
    box = ndimage.find_objects((pair.predicted | pair.truth).astype(np.uint8))
    predicted, truth = (mask[box[0]] if box else mask[:1, :1, :1] for mask in (pair.predicted, pair.truth))
    total = int(predicted.sum()) + int(truth.sum())
    dice = 2 * int((predicted & truth).sum()) / (total + _PER_VOXEL)
    if not (predicted.any() and truth.any()):
        return {"dice": dice, "nsd": 0.0, "hd95": float("nan")}
    to_truth, to_predicted = (ndimage.distance_transform_edt(~mask) for mask in (truth, predicted))
    outside = np.concatenate([to_truth[predicted & ~truth], to_predicted[truth & ~predicted]])
    if not len(outside):
        repairs.repair(
            f"{pair.target} in {pair.volume} is predicted without any error",
            reference="stops with IndexError",
            instead="take 0 as its HD95",
        )
    near = surface = 0
    for mask, distances in ((predicted, to_truth), (truth, to_predicted)):
        border = mask & ~ndimage.binary_erosion(mask)
        surface += int(border.sum())
        near += int((distances[border] <= _TOLERANCE).sum())
    return {
        "dice": dice,
        "nsd": near / (surface + _PER_VOXEL),
        "hd95": float(np.percentile(outside, 95)) if len(outside) else 0.0,
    }
