"""Volumes (NIfTI) as voxels in one orientation, and their grey window."""

import itertools
from pathlib import Path

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import shown


def load_nifti(path: Path, like: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of a NIfTI file as (slices, rows, columns): axial, feet to head, front up, patient's right on
    the left; and their affine, from numbers of voxels to the right, front and head to millimetres.

    The nearest axis-aligned orientation is taken; nothing is resampled. Axes of length 1 after the third are
    dropped.

    Args:
        path: of the file.
        like: the affine of another volume. The orientation nearest to its axes is taken instead: of two
            oblique scans of the same voxels, each for itself could be nearest to another one.

    Raises:
        InputError: nibabel is not installed, or the file is no 3-D NIfTI volume of one number a voxel.
    """
    try:
        import nibabel
    except ImportError as error:
        raise InputError("Reading NIfTI needs nibabel; install it with `pip install nibabel`.") from error
    try:
        image = nibabel.squeeze_image(nibabel.load(path))
        axes = image.affine if like is None else np.linalg.inv(like) @ image.affine
        if len(image.shape) >= 3:
            image = image.as_reoriented(nibabel.io_orientation(axes))
        voxels = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises whatever its parsers met
        reason = shown(" ".join(str(error).split()))
        raise InputError(f"{shown(path)} is not a NIfTI volume that nibabel can read ({reason}).") from error
    if voxels.ndim != 3:
        raise InputError(f"{shown(path)} has {voxels.ndim} axes; give one 3-D volume a file.")
    if voxels.dtype.kind not in "buif":
        raise InputError(
            f"{shown(path)} holds colours or complex numbers; give a volume of one number a voxel."
        )
    return voxels.transpose(2, 1, 0)[:, ::-1, ::-1], image.affine


def load_labels(path: Path, like: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """As `load_nifti`, with the whole numbers that labels are.

    Raises:
        InputError: as `load_nifti`.
    """
    values, affine = load_nifti(path, like)
    # Scale factors and resampling leave values such as 1.00001.
    return np.rint(values) if values.dtype.kind == "f" else values, affine


def load_labelled(volume: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of a scan and the labels of the same voxels, as `load_nifti` lays them.

    Voxels that are not finite, as some scans have outside their field of view, get the lowest finite value.

    Raises:
        InputError: as `load_nifti`, or the two differ in shape or place, or no voxel is finite.
    """
    voxels, affine = load_nifti(volume)
    values, other = load_labels(labels, like=affine)
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
