"""Pictures, masks and tables of a few pixels, for tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from unibiomed_jax.data.transforms import SampleConfig, SampleSizes

# Sizes of the recorded micro model: fast, and no two of them equal.
SIZES = SampleSizes(
    tile_size=28, tokens_per_tile=4, min_tiles=1, max_tiles=4, use_thumbnail=True, sam_size=64, mask_size=16
)
SMALL = SampleConfig(max_tokens=600)


def save_picture(path: Path, size=(60, 30), seed=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def save_square(path: Path, size=(60, 30), corner=(5, 4), side=12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], np.uint8)
    mask[corner[1] : corner[1] + side, corner[0] : corner[0] + side] = 255
    Image.fromarray(mask).save(path)


def write_table(path: Path, table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))


def coco_table(count: int, sentence="Liver in abdomen CT.", **sizes) -> dict:
    return {
        "images": [{"id": i, "file_name": f"{i}.png", **sizes} for i in range(count)],
        "annotations": [
            {"id": i, "image_id": i, "file_name": f"{i}.png", "mask_file": f"{i}_liver.png",
             "sentences": [{"raw": sentence, "sent": sentence}]}
            for i in range(count)
        ],
    }  # fmt: skip
