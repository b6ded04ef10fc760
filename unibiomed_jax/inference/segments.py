"""The masks of an answer at the size of its image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from unibiomed_jax.inference.answer import OpenedImage, Segment
from unibiomed_jax.inference.phrases import Phrase
from unibiomed_jax.masks.resize import upscale_masks


def full_size(
    image: OpenedImage,
    masks: Float32[np.ndarray, "objects frames M M"],
    ious: Float32[np.ndarray, "objects frames"],
    scores: Float32[np.ndarray, "objects frames"],
    phrases: Sequence[Phrase],
    sam_size: int,
    hide_absent: bool,
) -> tuple[Segment, ...]:
    """One segment for every mask.

    Args:
        image: what the answer is about.
        masks, ious, scores: logits of the masks, their predicted IoUs, logits of the objects' presence.
        phrases: what each mask is about.
        sam_size: side of SAM2's image, pixels.
        hide_absent: empty the masks, frame by frame, whose score is not above 0.
    """
    width, height = image.size
    segments = []
    for number, low in enumerate(masks):
        logits = upscale_masks(low, (height, width), sam_size)
        if hide_absent:
            logits = np.where(scores[number][:, None, None] > 0, logits, -np.abs(logits))
        drop = (lambda x: x) if image.is_volume else (lambda x: x[0])
        segments.append(
            Segment(
                phrase=phrases[number].text,
                mask=drop(logits > 0),
                logits=drop(logits),
                iou=drop(ious[number].tolist()),
                object_score=drop(scores[number].tolist()),
            )
        )
    return tuple(segments)
