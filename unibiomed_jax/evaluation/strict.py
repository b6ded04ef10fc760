"""Masks by the strict protocol: each case once, everything in millimetres, nothing lost.

A case is one target in one image or volume of a patient. The definitions are those of docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool
from scipy.optimize import linear_sum_assignment

from unibiomed_jax.evaluation.paper_masks import resize_nearest
from unibiomed_jax.evaluation.records import Sample, decode_masks
from unibiomed_jax.evaluation.surfaces import bounding_box, join_boxes, measure

# Tolerances of the normalised surface Dice, in mm (in pixels where the spacing is not known).
TOLERANCES = (1.0, 2.0, 3.0)
# Shapes of a prediction and its truth whose sides differ by more are not of one image.
_ASPECT = 0.01


class NotComparable(Exception):
    """Why a record cannot be scored."""


def score_masks(sample: Sample, tolerances: Mapping[str, float] | None = None) -> dict[str, float]:
    """The scores of a record with truth masks.

    | score | of | meaning |
    |---|---|---|
    | dice, iou | all | both empty 1, one empty 0 |
    | dice_present | truth not empty | Dice; no mask is 0 |
    | absent_correct | truth empty | 1 if nothing was predicted |
    | false_positive_UNIT | truth empty | what was predicted: mm2, mm3, px or voxel |
    | nsd_1mm, ... | all | normalised surface Dice; both empty 1, one empty 0 |
    | nsd_own_mm | targets with a tolerance of their own | as above |
    | hd95_mm | both or none empty | 95th percentile of distances between the surfaces; both empty 0 |
    | hd95_penalised_mm | all | the same, the diagonal of the image where one is empty |
    | assigned_dice | several masks | the sum over the best pairs, divided by pairs and masks left over |

    With several masks, all but the last are of their unions.

    Args:
        sample: the record.
        tolerances: of the normalised surface Dice by target, mm.

    Raises:
        NotComparable: the masks are not of one image.
    """
    truths = decode_masks(sample.truth_masks, sample.doc_id)
    if len({mask.shape for mask in truths}) > 1:
        raise NotComparable("truth masks of several sizes")
    masks = [_on_grid(mask, truths[0].shape) for mask in decode_masks(sample.masks, sample.doc_id)]
    truth = np.logical_or.reduce(truths) if len(truths) > 1 else truths[0]
    predicted = np.zeros_like(truth) if not masks else np.logical_or.reduce(masks) if masks[1:] else masks[0]
    own = (tolerances or {}).get(sample.category)
    scores = score_pair(truth, predicted, sample.spacing, own)
    if len(truths) > 1 or len(masks) > 1:
        scores["assigned_dice"] = assigned_dice(truths, masks)
    return scores


def score_pair(
    truth: Bool[np.ndarray, "*slices height width"],
    predicted: Bool[np.ndarray, "*slices height width"],
    spacing: Sequence[float] | None,
    own_tolerance: float | None = None,
) -> dict[str, float]:
    """The scores of one mask against one truth, as in `score_masks`."""
    if spacing is not None and len(spacing) != truth.ndim:
        raise NotComparable(f"a spacing of {len(spacing)} numbers for a mask of {truth.ndim} axes")
    known = spacing is not None
    spacing = tuple(spacing) if known else (1.0,) * truth.ndim
    diagonal = float(np.hypot.reduce([n * size for n, size in zip(truth.shape, spacing, strict=True)]))
    element = "voxel" if truth.ndim == 3 else "px"
    content = f"mm{truth.ndim}" if known else element
    pixel = float(np.prod(spacing))
    truth_box, predicted_box = bounding_box(truth), bounding_box(predicted)
    if truth_box is None:
        size = 0 if predicted_box is None else int(np.count_nonzero(predicted[predicted_box]))
        scores = {"dice": float(size == 0), "iou": float(size == 0)}
        scores |= {"absent_correct": float(size == 0), f"false_positive_{content}": size * pixel}
    else:
        inside = truth[truth_box]
        both = int(np.count_nonzero(inside & predicted[truth_box]))
        total = int(np.count_nonzero(inside)) + (
            0 if predicted_box is None else int(np.count_nonzero(predicted[predicted_box]))
        )
        dice = 2 * both / total
        scores = {"dice": dice, "iou": both / (total - both), "dice_present": dice}
    unit = "mm" if known else element
    names = {f"nsd_{tolerance:g}{unit}": tolerance for tolerance in TOLERANCES}
    if own_tolerance is not None and known:
        names["nsd_own_mm"] = own_tolerance
    if truth_box is None or predicted_box is None:
        agree = truth_box is predicted_box
        scores |= dict.fromkeys(names, float(agree))
        if agree:
            scores[f"hd95_{unit}"] = 0.0
        scores[f"hd95_penalised_{unit}"] = 0.0 if agree else diagonal
        return scores
    if truth.ndim == 3 and truth_box[0] == predicted_box[0] and truth_box[0].stop - truth_box[0].start == 1:
        # Within a single slice contours count: in 3D the two flat faces would outweigh them.
        truth, predicted, spacing = truth[truth_box[0].start], predicted[truth_box[0].start], spacing[1:]
    else:
        box = join_boxes(truth_box, predicted_box)
        truth, predicted = truth[box], predicted[box]
    found = measure(truth, predicted, spacing)
    hd95 = found.hausdorff()
    scores |= {name: found.dice(tolerance) for name, tolerance in names.items()}
    return scores | {f"hd95_{unit}": hd95, f"hd95_penalised_{unit}": hd95}


def assigned_dice(truths: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """The sum of Dice over the best one-to-one pairs, divided by the number of pairs and of masks left over.

    Two empty masks agree. Without any mask on either side the answer is right: 1.
    """
    if not truths and not masks:
        return 1.0
    table = np.zeros((len(truths), len(masks)))
    sizes = [[int(np.count_nonzero(mask)) for mask in side] for side in (truths, masks)]
    for row, truth in enumerate(truths):
        for column, mask in enumerate(masks):
            total = sizes[0][row] + sizes[1][column]
            table[row, column] = 2 * int(np.count_nonzero(truth & mask)) / total if total else 1.0
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched = [value for value in table[rows, columns] if value > 0]
    return float(sum(matched)) / (len(truths) + len(masks) - len(matched))


def _on_grid(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A prediction on the truth's grid, each pixel that of the nearest."""
    if mask.shape == shape:
        return mask
    height, width = shape[-2:]
    scaled = mask.shape[-2] * width, mask.shape[-1] * height
    if mask.shape[:-2] != shape[:-2] or abs(scaled[0] - scaled[1]) > _ASPECT * max(scaled):
        sides = ["x".join(map(str, found[::-1])) for found in (mask.shape, shape)]
        raise NotComparable(f"a mask of {sides[0]} pixels for a truth of {sides[1]}")
    if mask.ndim == 2:
        return resize_nearest(mask, (height, width))
    return np.stack([resize_nearest(piece, (height, width)) for piece in mask])
