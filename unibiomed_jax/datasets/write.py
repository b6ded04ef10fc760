"""Writing datasets in the format that the readers take: images, masks, JSON tables, splits by patient."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import write_beside

SPLITS = ("train", "val", "test")


def mask_name(stem: str, target: str) -> str:
    """File name of one target's mask: the image's stem, an underscore, the target with + for blanks."""
    return f"{stem}_{target.replace(' ', '+')}.png"


def fit_size(width: int, height: int, long_side: int | None) -> tuple[int, int]:
    """The size with its long side brought down to `long_side` pixels; smaller images keep theirs."""
    if long_side is None or max(width, height) <= long_side:
        return width, height
    scale = long_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def save_image(
    path: Path, pixels: np.ndarray, long_side: int | None = None, quality: int = 90
) -> tuple[int, int]:
    """Write (H, W) or (H, W, 3) uint8 pixels as JPEG or PNG by the name's ending; returns (width, height)."""
    image = Image.fromarray(pixels)
    size = fit_size(*image.size, long_side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    options = {"quality": quality} if path.suffix == ".jpg" else {"optimize": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return size


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write a boolean (H, W) mask as a 1-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(mask, bool)).save(path, optimize=True)


def save_json(path: Path, table: dict) -> None:
    """Write a table with one entry per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, (_lines(table, 2) + "\n").encode())


def _lines(value, depth: int) -> str:
    """JSON with line breaks down to `depth` levels."""
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[\n" + ",\n".join(_lines(item, depth - 1) for item in value) + "\n]"
    items = (
        f"{json.dumps(key, ensure_ascii=False)}: {_lines(item, depth - 1)}" for key, item in value.items()
    )
    return "{\n" + ",\n".join(items) + "\n}"


@dataclass
class CocoTable:
    """The COCO-like table of one split: images, one annotation per (image, target), categories."""

    split: str
    images: dict[str, dict] = field(default_factory=dict)
    annotations: list[dict] = field(default_factory=list)
    categories: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        file_name: str,
        size: tuple[int, int],
        patient: str,
        mask_file: str,
        category: str,
        sentences: Sequence[str],
        **extra,
    ) -> None:
        """Add one annotation; the image is added at its first one. `size` is (width, height)."""
        image = self.add_image(file_name, size, patient)
        number = len(self.annotations)
        self.annotations.append(
            {
                "id": number,
                "image_id": image["id"],
                "file_name": file_name,
                "mask_file": mask_file,
                "split": self.split,
                "category_id": self.categories.setdefault(category, len(self.categories) + 1),
                "iscrowd": 0,
                "sentences": [
                    {"raw": text, "sent": text, "sent_id": position}
                    for position, text in enumerate(sentences)
                ],
                **extra,
            }
        )

    def add_caption(self, file_name: str, size: tuple[int, int], patient: str, caption: str, **extra) -> None:
        """Add one image-text pair without a mask."""
        image = self.add_image(file_name, size, patient)
        entry = {"id": len(self.annotations), "image_id": image["id"], "file_name": file_name}
        self.annotations.append({**entry, "caption": caption, **extra})

    def add_image(self, file_name: str, size: tuple[int, int], patient: str) -> dict:
        width, height = size
        entry = {
            "id": len(self.images),
            "file_name": file_name,
            "width": width,
            "height": height,
            "patient": patient,
        }
        return self.images.setdefault(file_name, entry)

    def save(self, path: Path) -> None:
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        save_json(
            path,
            {"images": list(self.images.values()), "annotations": self.annotations, "categories": categories},
        )


def assign_splits(
    groups: Iterable[str],
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 42,
    pinned: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Patient -> "train", "val" or "test": whole patients, by the order of a hash, so that files may come and
    go.

    Args:
        groups: the patient of every image (repeats count: a patient weighs as many images as he has).
        fractions: shares of images wanted in train, val and test; a non-zero share gets at least one patient
            where there are as many patients as splits.
        seed: another seed gives another split.
        pinned: patients whose split is set by hand.

    Raises:
        InputError: fractions that are negative or do not sum to 1, or a pin to an unknown split.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(f"The split fractions {tuple(fractions)} must be three shares that sum to 1.")
    pinned = dict(pinned or {})
    for group, split in pinned.items():
        if split not in SPLITS:
            raise InputError(
                f"Patient {group} is pinned to the split {split!r}; use one of {', '.join(SPLITS)}."
            )
    weights: dict[str, int] = {}
    for group in groups:
        weights[group] = weights.get(group, 0) + 1
    splits = {group: pinned[group] for group in weights if group in pinned}
    free = sorted(
        (group for group in weights if group not in pinned),
        key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest(),
    )
    total = sum(weights.values())
    filled = {split: sum(weights[g] for g, s in splits.items() if s == split) for split in SPLITS}
    wanted = dict(zip(SPLITS, fractions, strict=True))
    # The held-out splits are filled first; each leaves enough patients for those after it.
    for split in ("test", "val", "train"):
        others = [
            other for other in ("val", "train") if wanted[other] > 0 and other != split and not filled[other]
        ]
        reserve = len(others) if split == "test" else (1 if split == "val" and "train" in others else 0)
        while free and wanted[split] > 0:
            enough = filled[split] + weights[free[0]] / 2 > wanted[split] * total
            if split != "train" and (len(free) <= reserve or (filled[split] and enough)):
                break
            splits[free[0]] = split
            filled[split] += weights[free.pop(0)]
    for group in free:  # only when train is given no share
        splits[group] = "train"
    return splits
