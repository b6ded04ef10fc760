"""Volumes as slices in the dataset format: slice and mask files, tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unibiomed_jax.datasets.write import CocoTable, mask_name, save_image, save_mask
from unibiomed_jax.errors import InputError


@dataclass(frozen=True)
class VolumeTarget:
    """One target of a volume: its name in mask files, its wordings, its voxels (slices, rows, columns)."""

    name: str
    words: tuple[str, ...]
    mask: np.ndarray


def write_volume(
    root: Path,
    name: str,
    pixels: np.ndarray,
    targets: Sequence[VolumeTarget],
    *,
    patient: str,
    window: tuple[float, float],
    min_pixels: int = 1,
    table: CocoTable | None = None,
    table_step: int = 1,
) -> dict:
    """Write the slices and masks of one volume; returns its entry for meta_<split>.json.

    A target has no mask file in slices where it has fewer than `min_pixels` pixels. Every `table_step`-th
    slice also goes into `table`, as 2-D annotations of the same files.
    """
    height, width = pixels.shape[1:]
    digits = max(3, len(str(len(pixels) - 1)))  # the names sort as the slices do
    slices = [f"{name}-{number:0{digits}d}.png" for number in range(len(pixels))]
    for file, image in zip(slices, pixels, strict=True):
        save_image(root / name / file, image)
    expressions: dict[str, dict] = {}
    for target in targets:
        if target.mask.shape != pixels.shape:
            raise InputError(
                f"The labels of {name} have the shape {target.mask.shape} but its image {pixels.shape}; "
                "resample the "
                "labels to the image."
            )
        mask_files, image_files = [], []
        for number, file in enumerate(slices):
            if target.mask[number].sum() < min_pixels:
                continue
            mask_file = f"mask/{name}/{mask_name(Path(file).stem, target.name)}"
            save_mask(root / mask_file, target.mask[number])
            mask_files.append(mask_file)
            image_files.append(f"{name}/{file}")
            if table is not None and number % table_step == 0:
                table.add(image_files[-1], (width, height), patient, mask_file, target.name, target.words)
        if mask_files:
            entry = {"exp": target.words[0], "mask_file": mask_files, "img_file": image_files}
            expressions[str(len(expressions))] = entry
    return {
        "slices": slices,
        "expressions": expressions,
        "patient": patient,
        "width": width,
        "height": height,
        "window": [round(float(bound), 3) for bound in window],
    }


def split_labels(labels: np.ndarray, names: Mapping[int, str], words) -> list[VolumeTarget]:
    """One target for every name of which a value occurs; `words(name)` gives its wordings."""
    present = set(np.unique(labels).tolist())
    values: dict[str, list[int]] = {}
    for value, name in names.items():
        if value in present:
            values.setdefault(name, []).append(value)
    return [VolumeTarget(name, words(name), np.isin(labels, found)) for name, found in values.items()]
