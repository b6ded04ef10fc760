"""Slices with masks drawn on them, as pictures and as DICOM Secondary Captures that any viewer shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from unibiomed_jax.masks.overlay import NOTICE, overlay
from unibiomed_jax.outputs import dicom_objects
from unibiomed_jax.outputs.deidentify import Deidentifier
from unibiomed_jax.studies.grey import require_window, to_grey
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.views import View, toward
from unibiomed_jax.studies.windows import Window


def draw_slices(
    study: Study, masks: Mapping[str, np.ndarray], window: Window | None, view: View | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """Every slice in which a mask has pixels, with its number and the masks drawn on it.

    As it is stored, or turned as `view` says.

    Raises:
        InputError: the study is grey and no window is given.
    """
    require_window(study, window)
    for index in np.flatnonzero(np.any([mask.any((1, 2)) for mask in masks.values()], axis=0)).tolist():
        pixels = study.values[index]
        if window is not None and not study.is_colour:
            pixels = to_grey(study, window, truncate=False, index=index)
        drawn = [mask[index] for mask in masks.values()]
        if view is not None:
            pixels, *drawn = (np.ascontiguousarray(view.show(layer)) for layer in (pixels, *drawn))
        yield index, overlay(Image.fromarray(pixels), drawn, list(masks))


def write_secondary_captures(
    folder: Path,
    study: Study,
    masks: Mapping[str, np.ndarray],
    window: Window | None,
    *,
    deidentify: Deidentifier | None = None,
) -> list[str]:
    """Write a Secondary Capture for each slice with a mask; returns their names.

    `deidentify` takes the patient out of their attributes; pixels stay as they are.

    Raises:
        InputError: the study is not from DICOM or its attributes are incomplete; as `draw_slices`.
    """
    frames = dicom_objects.dicom_frames(study, "A secondary capture")
    series, names = dicom_objects.new_uid(), []
    axes = None if study.geometry is None else (study.geometry.across, study.geometry.down)
    for index, picture in draw_slices(study, masks, window):
        with dicom_objects.written(study, "A secondary capture"):
            import highdicom

            capture = highdicom.sc.SCImage.from_ref_dataset(
                dicom_objects.source_header(frames[index].file.header),
                pixel_array=np.asarray(picture),
                photometric_interpretation="RGB",
                bits_allocated=8,
                coordinate_system="PATIENT",
                series_instance_uid=series,
                series_number=dicom_objects.SERIES_NUMBER + 1,
                sop_instance_uid=dicom_objects.new_uid(),
                instance_number=index + 1,
                manufacturer=dicom_objects.MAKER,
                patient_orientation=("L", "P") if axes is None else tuple(map(toward, axes)),
                series_description="UniBiomed overlays",
            )
            if axes is None:
                capture.PatientOrientation = ""
            # Of a body part that may be one of a pair; empty where the source does not say.
            capture.Laterality = frames[index].file.header.get("Laterality") or ""
            capture.BurnedInAnnotation = "YES"
            capture.DerivationDescription = NOTICE
            names.append(f"overlay_{index + 1:04d}.dcm")
            dicom_objects.save(capture, folder / names[-1], deidentify)
    return names
