"""A mask as a NIfTI file on the grid of its study."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.studies.dicom_series import uneven_places
from unibiomed_jax.studies.study import GridSource, Study
from unibiomed_jax.studies.volume_files import TO_LPS

# NIfTI's code for coordinates of the scanner.
_SCANNER = 1


def write_nifti_mask(path: Path, study: Study, mask: np.ndarray) -> None:
    """Write a mask as whole numbers 0 and 1 of 8 bits.

    A study that was NIfTI gets its mask on the same grid, with the same orientation to the bit and the same
    codes. A tilted volume from DICOM is sheared, which only the sform can say; its qform is left unset, so
    that no reader takes it for straight.

    Args:
        path: of the new file, .nii.gz.
        study: with geometry, or from a NIfTI file.
        mask: (slices, rows, columns) bool.

    Raises:
        InputError: the study's pixels have no known place, its slices lie at uneven distances, or nibabel is
            not installed.
    """
    try:
        import nibabel
    except ImportError:
        raise InputError(
            "Writing NIfTI needs nibabel; install it with `pip install 'unibiomed-jax[medical]'`."
        ) from None
    geometry = study.geometry
    if geometry is None:
        raise InputError(f"{study.series_alias} has no known place, which NIfTI states; leave 'nifti' out.")
    if isinstance(study.source, GridSource):
        affine, header = TO_LPS @ study.source.affine, study.source.header
        voxels = study.source.to_grid(mask.astype(np.uint8))
    else:
        if len(geometry.uneven):
            raise InputError(
                f"{study.series_alias} is {uneven_places(geometry)}, and NIfTI knows even steps alone; write "
                "'seg' or 'rtstruct', or export the missing slices."
            )
        affine, header = TO_LPS @ geometry.affine, None
        voxels = mask.astype(np.uint8).transpose(2, 1, 0)
    if header is None:
        image = nibabel.Nifti1Image(voxels, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, _SCANNER)
        if geometry.is_tilted:
            image.header["qform_code"] = 0
        else:
            image.set_qform(affine, _SCANNER)
    else:
        # With no affine of its own the image keeps the header's, bit for bit.
        header = header.copy()
        header.set_data_dtype(np.uint8)
        header.set_data_shape(voxels.shape)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"] = 0, 1
        image = (nibabel.Nifti2Image if header.sizeof_hdr == 540 else nibabel.Nifti1Image)(
            voxels, None, header
        )
    nibabel.save(image, path)
