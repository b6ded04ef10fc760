"""Volumes (NIfTI) as slices in the dataset format: orientation, grey window, slice and mask files, tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unibiomed_jax.data.writer import CocoTable, mask_name, save_image, save_mask
from unibiomed_jax.errors import InputError


@dataclass(frozen=True)
class VolumeTarget:
    """One target of a volume: its name in mask files, its wordings, its voxels (slices, rows, columns)."""

    name: str
    words: tuple[str, ...]
    mask: np.ndarray


def load_nifti(path: Path) -> np.ndarray:
    """Voxels of a NIfTI file as (slices, rows, columns): axial, feet to head, front up, patient's right on
    the left.

    The nearest axis-aligned orientation is taken; nothing is resampled.

    Raises:
        InputError: nibabel is not installed, or the file is no 3-D NIfTI volume.
    """
    try:
        import nibabel
    except ImportError as error:
        raise InputError("Reading NIfTI needs nibabel; install it with `pip install nibabel`.") from error
    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        voxels = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises whatever its parsers met
        raise InputError(f"{path} is not a NIfTI volume that nibabel can read ({error}).") from error
    if voxels.ndim != 3:
        raise InputError(f"{path} has {voxels.ndim} axes; give one 3-D volume a file.")
    return voxels.transpose(2, 1, 0)[:, ::-1, ::-1]


def apply_window(voxels: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values from window[0] to window[1] stretched to 0..255, those outside clipped."""
    low, high = window
    if not low < high:
        raise InputError(f"The window {low:g}..{high:g} is empty; give the lower value first.")
    scaled = (np.clip(voxels.astype(np.float32), low, high) - low) * (255.0 / (high - low))
    return np.rint(scaled).astype(np.uint8)


def percentile_window(voxels: np.ndarray, low: float = 0.5, high: float = 99.5) -> tuple[float, float]:
    """A window for scans without a fixed scale (MRI): percentiles of the whole volume."""
    bounds = np.percentile(voxels, [low, high])
    return float(bounds[0]), float(max(bounds[1], bounds[0] + 1e-6))


def write_volume(
    root: Path,
    name: str,
    pixels: np.ndarray,
    targets: Sequence[VolumeTarget],
    *,
    patient: str,
    window: tuple[float, float],
    min_pixels: int = 12,
    table: CocoTable | None = None,
    table_step: int = 1,
) -> dict:
    """Write the slices and masks of one volume; returns its entry for meta_<split>.json.

    A target has no mask file in slices where it has fewer than `min_pixels` pixels. Every `table_step`-th
    slice also goes into `table`, as 2-D annotations of the same files.
    """
    height, width = pixels.shape[1:]
    slices = [f"{name}-{number:03d}.png" for number in range(len(pixels))]
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
    """One target for every value of `names` that occurs; `words(name)` gives its wordings."""
    values = set(np.unique(labels).tolist())
    return [
        VolumeTarget(name, words(name), labels == value) for value, name in names.items() if value in values
    ]
