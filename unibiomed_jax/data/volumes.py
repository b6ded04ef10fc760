"""Volumes (NIfTI) as slices in the dataset format: orientation, grey window, slice and mask files, tables."""

import itertools
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


def load_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of a NIfTI file as (slices, rows, columns): axial, feet to head, front up, patient's right on
    the left; and their affine, from numbers of voxels to the right, front and head to millimetres.

    The nearest axis-aligned orientation is taken; nothing is resampled.

    Raises:
        InputError: nibabel is not installed, or the file is no 3-D NIfTI volume of one number a voxel.
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
    if voxels.dtype.kind not in "buif":
        raise InputError(f"{path} holds colours or complex numbers; give a volume of one number a voxel.")
    return voxels.transpose(2, 1, 0)[:, ::-1, ::-1], image.affine


def load_labels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """As `load_nifti`, with the whole numbers that labels are.

    Raises:
        InputError: as `load_nifti`.
    """
    values, affine = load_nifti(path)
    # Scale factors and resampling leave values such as 1.00001.
    return np.rint(values) if values.dtype.kind == "f" else values, affine


def load_labelled(volume: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of a scan and the labels of the same voxels, as `load_nifti` lays them.

    Voxels that are not finite, as some scans have outside their field of view, get the lowest finite value.

    Raises:
        InputError: as `load_nifti`, or the two differ in shape or place, or no voxel is finite.
    """
    (voxels, affine), (values, other) = load_nifti(volume), load_labels(labels)
    if voxels.shape != values.shape:
        raise InputError(
            f"{labels} has the shape {values.shape} but {volume} {voxels.shape}; resample the labels to the "
            "volume."
        )
    # Affines differ in their last digits from program to program; the corners tell how much that moves.
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n) for n in voxels.shape[::-1]))])
    apart = np.abs((affine - other) @ corners.T).max()
    if not apart <= 0.1 * np.linalg.norm(affine[:3, :3], axis=0).min():
        raise InputError(
            f"{labels} lies elsewhere in space than {volume}, by up to {apart:.3g} mm; resample the labels "
            "to the volume."
        )
    finite = np.isfinite(voxels)
    if not finite.any():
        raise InputError(f"{volume} has no voxel of a finite value; export it again.")
    return voxels if finite.all() else np.where(finite, voxels, voxels[finite].min()), values


def apply_window(voxels: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values from window[0] to window[1], the larger one, stretched to 0..255, those outside clipped."""
    low, high = window
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
