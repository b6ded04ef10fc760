"""Masks of a study as a COCO dataset, an image for each slice, which pycocotools reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from unibiomed_jax.masks import run_length
from unibiomed_jax.masks.overlay import NOTICE


def write_coco(path: Path, shape: tuple[int, int, int], masks: Mapping[str, np.ndarray]) -> None:
    """Write masks as compressed run lengths.

    Ids of images are the numbers of the slices, from 1; rows and columns are as stored. Each phrase is a
    category; a slice without it has no annotation.

    Args:
        path: of the new file, .json.
        shape: slices, rows, columns.
        masks: phrase -> bool of that shape.
    """
    slices, height, width = shape
    annotations = []
    for category, mask in enumerate(masks.values(), 1):
        for index in np.flatnonzero(mask.any((1, 2))).tolist():
            encoded = run_length.encode(mask[index])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category,
                    "segmentation": encoded,
                    "area": int(mask[index].sum()),
                    "bbox": coco.toBbox(encoded).tolist(),
                    "iscrowd": 0,
                }
            )
    dataset = {
        "info": {"description": NOTICE},
        "images": [{"id": number, "height": height, "width": width} for number in range(1, slices + 1)],
        "categories": [{"id": number, "name": phrase} for number, phrase in enumerate(masks, 1)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(dataset, ensure_ascii=False) + "\n", encoding="utf-8")
