"""Volume files without a patient's record: NIfTI, and NRRD and MetaImage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from unibiomed_jax.errors import DamagedError, InputError
from unibiomed_jax.studies.place import Place
from unibiomed_jax.studies.series import Series
from unibiomed_jax.studies.study import NO_SIDES, Aliases, Geometry, GridSource, Study

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
# From NIfTI's right and front to DICOM's left and back, and the other way.
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Two affines that differ by more at a corner, mm, mean different places.
_DIFFERENT = 0.1
# The axis of slices is the one of largest spacing if that is so much larger than the next.
_ANISOTROPY = 1.2


def find_nifti_series(place: Place, aliases: Aliases) -> list[Series]:
    """The volume of a NIfTI file, or one for each of its time points; none of its voxels are read."""
    try:
        import nibabel
    except ImportError:
        raise InputError(
            "Reading NIfTI needs nibabel; install it with `pip install 'unibiomed-jax[medical]'`."
        ) from None
    zipped = _zipped(place.path)
    if zipped != place.path.name.lower().endswith(".gz"):
        remedy = "name it .nii.gz" if zipped else "name it .nii"
        raise InputError(f"{place} is {'' if zipped else 'not '}compressed, against its name; {remedy}.")
    try:
        image = nibabel.load(place.path)
        header, shape = image.header, image.shape
    except Exception as error:  # nibabel raises whatever its parsers met
        raise _damaged(place, error) from None
    if not isinstance(image, nibabel.Nifti1Pair):  # such as CIFTI, values on a surface
        raise InputError(f"{place} is a NIfTI file that is no volume; give a volume.")
    if header.get_data_dtype().kind not in "biuf":
        raise InputError(f"{place} holds colours or complex numbers; give a volume of one number a voxel.")
    times = int(np.prod(shape[3:4])) if len(shape) > 3 else 1
    if any(length > 1 for length in shape[4:]) or not 2 <= len(shape) or 0 in shape:
        raise InputError(f"{place} has the shape {shape}; give a volume of three axes, or four with time.")
    grid = (*shape[:3], 1)[:3]
    affine, notes = _placed(image, place)
    header = _nameless(header)

    def voxels(time: int) -> np.ndarray:
        try:
            data = image.dataobj[..., time] if len(shape) == 4 else image.dataobj[...]
            return np.asarray(data, np.float32).reshape(grid)
        except Exception as error:  # as above
            raise _damaged(place, error) from None

    name, study_alias = aliases.series(str(place.path)), aliases.study(str(place.path))
    return [
        _series(
            name if times == 1 else f"{name}/{time + 1}",
            study_alias,
            place,
            grid,
            affine,
            (*([f"time point {time + 1} of {times}"] if times > 1 else []), *notes),
            shape if times == 1 else grid,
            lambda time=time: voxels(time),
            header,
        )
        for time in range(times)
    ]


def find_itk_series(place: Place, aliases: Aliases) -> list[Series]:
    """The volume of a file that SimpleITK reads."""
    try:
        import SimpleITK
    except ImportError:
        raise InputError(
            "Reading NRRD and MetaImage needs SimpleITK; install it with `pip install 'unibiomed-jax[itk]'`."
        ) from None
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(place.path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _damaged(place, error) from None
    size, axes = reader.GetSize(), reader.GetDimension()
    if axes not in (2, 3) or reader.GetNumberOfComponents() != 1:
        raise InputError(
            f"{place} has {axes} axes and {reader.GetNumberOfComponents()} values a voxel; give a volume of "
            "three axes and one value."
        )
    affine = np.eye(4)
    affine[:axes, :axes] = np.reshape(reader.GetDirection(), (axes, axes)) * np.array(reader.GetSpacing())
    affine[:axes, 3] = reader.GetOrigin()
    _require_invertible(affine, place)
    grid = (*size, 1)[:3]

    def voxels() -> np.ndarray:
        try:
            return SimpleITK.GetArrayFromImage(reader.Execute()).astype(np.float32).T.reshape(grid)
        except RuntimeError as error:
            raise _damaged(place, error) from None

    name, study_alias = aliases.series(str(place.path)), aliases.study(str(place.path))
    return [_series(name, study_alias, place, grid, affine, (), grid, voxels, None)]


def _series(
    name: str,
    study_alias: str,
    place: Place,
    grid: tuple[int, ...],
    affine: np.ndarray,
    notes: tuple[str, ...],
    shape: tuple[int, ...],
    voxels,
    header: Any,
) -> Series:
    axes, geometry, reversed_slices = _slices(grid, affine)
    if geometry.is_tilted:
        notes = (*notes, f"tilted: each slice is shifted by {geometry.tilt:.2f} mm in its plane")
    refusal = None
    if geometry.is_sheared:
        refusal = f"{name} has rows and columns that are not perpendicular; resample it to a straight grid."
    source = GridSource(affine, axes, reversed_slices, shape, header)

    def load() -> Study:
        values = voxels().transpose(axes)
        values = np.ascontiguousarray(values[::-1] if reversed_slices else values)
        finite = np.isfinite(values)
        if not finite.any():
            raise InputError(f"{place} has no voxel of a finite value; export it again.")
        padding, found = None, list(notes)
        if not finite.all():
            padding = ~finite
            values[padding] = values[finite].min()
            found.append("voxels without a value (NaN) are taken as not measured")
        return Study(
            values=values,
            modality="unknown",
            unit="",
            geometry=geometry,
            study_alias=study_alias,
            series_alias=name,
            notes=tuple(found),
            padding=padding,
            source=source,
        )

    return Series(
        alias=name,
        uid="",
        modality="unknown",
        body_part="",
        shape=tuple(grid[axis] for axis in axes),
        plane=geometry.plane,
        spacing=geometry.spacing,
        notes=notes,
        refusal=refusal,
        load=load,
    )


def _slices(grid: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, int, int], Geometry, bool]:
    """The axes of slices, rows and columns, where the slices lie, and whether they run against their normal.

    Slices follow the axis of largest spacing, as they were acquired; where none stands out, the body's axis.
    """
    steps = affine[:3, :3].T
    lengths = np.linalg.norm(steps, axis=1)
    *_, second, longest = np.argsort(lengths)
    upright = int(np.abs(steps[:, 2] / lengths).argmax())
    slices = int(longest) if lengths[longest] > _ANISOTROPY * lengths[second] else upright
    if 1 in grid and sorted(grid)[1] > 1:  # a single slice
        slices = grid.index(1)
    columns, rows = (axis for axis in range(3) if axis != slices)
    across, down, step = steps[columns], steps[rows], steps[slices]
    backwards = bool(step @ np.cross(across, down) < 0)
    numbers = np.arange(grid[slices])[:: -1 if backwards else 1]
    origins = affine[:3, 3] + numbers[:, None] * step
    return (slices, rows, columns), Geometry(origins, across, down, float(lengths[slices])), backwards


def _placed(image: Any, place: Place) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine in DICOM's patient coordinates, mm, and what is odd about it."""
    header, notes = image.header, []
    # The last three bits; nibabel has no name for some values of the others.
    unit, scale = {1: ("meter", 1000.0), 3: ("micron", 0.001)}.get(int(header["xyzt_units"]) % 8, ("mm", 1.0))
    affine = TO_LPS @ np.diag([scale, scale, scale, 1.0]) @ image.affine
    if scale != 1.0:
        notes.append(f"its unit, {unit}, was converted to mm")
    _require_invertible(affine, place)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)], float) * (
        *((*image.shape, 1)[:3]),
        1,
    )
    if not sform and not qform:
        notes.append(NO_SIDES)
    elif sform and qform:
        apart = np.abs((image.get_sform() - image.get_qform()) @ corners.T).max() * scale
        if apart > _DIFFERENT:
            notes.append(f"its two orientations differ by {apart:.2g} mm; the sform is used")
    zooms = np.array((*header.get_zooms(), 1.0)[:3], float)
    lengths = np.linalg.norm(image.affine[:3, :3], axis=0)
    if np.abs(zooms - lengths).max() > 0.01 * lengths.max():
        notes.append("its voxel sizes disagree with its orientation, which is used")
    return affine, tuple(notes)


def _require_invertible(affine: np.ndarray, place: Place) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise InputError(f"{place} has a singular orientation matrix; write its header again.")


def _nameless(header: Any) -> Any:
    """A copy that keeps where the voxels lie and drops every text."""
    header = header.copy()
    for text in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        if text in header:
            header[text] = b""
    header.extensions.clear()
    return header


def _zipped(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _damaged(place: Place, error: Exception) -> DamagedError:
    reason = "it ends too early" if "end-of-stream" in str(error) or "Expected" in str(error) else "damaged"
    return DamagedError(f"{place} is no volume that can be read ({reason}); copy it again from its source.")
