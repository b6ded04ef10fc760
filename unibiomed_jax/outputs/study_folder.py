"""Masks of a study on disk, in the forms that other programs read."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from unibiomed_jax.errors import DiskFullError, InputError
from unibiomed_jax.files import new_folder
from unibiomed_jax.inference.study_answer import StudyAnswer
from unibiomed_jax.outputs.coco import write_coco
from unibiomed_jax.outputs.deidentify import Deidentifier, identity_of
from unibiomed_jax.outputs.dicom_seg import write_dicom_seg
from unibiomed_jax.outputs.nifti_mask import write_nifti_mask
from unibiomed_jax.outputs.rtstruct import write_rtstruct
from unibiomed_jax.outputs.secondary_capture import draw_slices, write_secondary_captures
from unibiomed_jax.outputs.study_page import write_page
from unibiomed_jax.outputs.study_record import describe_study
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.views import upright
from unibiomed_jax.studies.windows import Window

# A NIfTI file for each mask; DICOM Segmentation, as bits or as a label map; DICOM RT Structure Set; DICOM
# Secondary Captures, as stored, and PNG pictures, as one looks at them, of the slices with masks; a COCO
# dataset; a page to look at all of it in a browser.
Format = Literal["nifti", "seg", "labelmap", "rtstruct", "sc", "png", "coco", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)
# Those that not every study can be written in.
_DEMANDING = ("nifti", "seg", "labelmap", "rtstruct", "sc")
# What an answer, and what masks made elsewhere, are described in.
ANSWER, RECORD, PAGE = "answer.json", "study.json", "study.html"


def write_study(
    study: Study,
    masks: StudyAnswer | Mapping[str, np.ndarray],
    out: str | os.PathLike,
    formats: Sequence[Format] = ("nifti", "seg"),
    *,
    window: Window | None = None,
    deidentify: bool | Deidentifier = False,
    overwrite: bool = False,
) -> None:
    """Write masks as a folder, which appears whole or not at all.

    Beside the files of each format lies `answer.json` (`study.json` of masks made elsewhere): what each mask
    is, its volume and slices, what is odd about the study, which window was used, and how an answer came
    about. It and all names of files are
    without the patient's identity, as is all else but the DICOM objects, which keep what an archive needs to
    file them.

    Args:
        study: what the masks were drawn on.
        masks: an answer, or phrase -> bool array of the shape (slices, rows, columns) of `study.values`. An
            empty one is recorded, and left out of the DICOM objects.
        out: the new folder.
        formats: what to write.
        window: for "sc", "png" and "html": values that become black and white. By default those of the
            answer.
        deidentify: take the patient's identity and dates out of DICOM objects, too, and replace UIDs, alike
            in all of them, and under one `Deidentifier` alike in all folders. It claims no conformance to a
            profile; pixels stay as they are.
        overwrite: replace what lies there.

    Raises:
        InputError: a mask has another shape, a format is unknown or cannot hold these masks, or the folder
            exists or cannot be written.
    """
    shape = study.values.shape[:3]
    answer = masks if isinstance(masks, StudyAnswer) else None
    if answer is not None:
        window = window or answer.window
    masks = {phrase: np.asarray(mask) for phrase, mask in (masks if answer is None else answer.masks).items()}
    for phrase, mask in masks.items():
        if mask.shape != shape or mask.dtype != bool:
            raise InputError(
                f"The mask {phrase!r} is {mask.dtype} of the shape {mask.shape}; give bool of the study's "
                f"{shape}."
            )
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"There is no format {name!r}; choose of {', '.join(FORMATS)}.")
    found = {phrase: mask for phrase, mask in masks.items() if mask.any()}
    record = describe_study(study, masks, answer, window) | {"identity": identity_of(bool(deidentify))}
    deidentifier = Deidentifier(study.study_alias) if deidentify is True else deidentify or None
    files: dict[str, list[str]] = {}
    try:
        with new_folder(out, overwrite=overwrite) as folder:
            for name in formats:
                if name == "html":
                    write_page(folder / PAGE, study, masks, record, answer=answer, window=window)
                    files[name] = [PAGE]
                else:
                    files[name] = _write(name, folder, study, masks, found, window, deidentifier)
            text = json.dumps(record | {"files": files}, indent=2, ensure_ascii=False)
            (folder / (RECORD if answer is None else ANSWER)).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"The folder cannot be written ({error.strerror}); choose another.") from None


def require_formats(study: Study, formats: Sequence[Format]) -> None:
    """Find out before a long answer whether masks of a study can be written: one of a pixel is, and deleted.

    Raises:
        InputError: a format cannot hold any mask of this study, or needs a package that is not installed.
        DiskFullError: the folder for temporary files cannot be written.
    """
    mask = np.zeros(study.values.shape[:3], bool)
    mask[0, 0, 0] = True
    masks, window = {"pixel": mask}, Window(0, 1, "any")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in formats:
                if name in _DEMANDING:  # deidentified, for others may read the folder
                    _write(name, Path(folder), study, masks, masks, window, Deidentifier("anyone"))
    except OSError as error:
        raise DiskFullError(
            f"The folder for temporary files cannot be written ({error.strerror}); set TMPDIR to another."
        ) from None


def _write(
    name: Format,
    folder: Path,
    study: Study,
    masks: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    window: Window | None,
    deidentify: Deidentifier | None,
) -> list[str]:
    """The names of the files of one format; none where it needs a mask and there is none."""
    if name == "nifti":
        names = [f"mask_{number}_{_slug(phrase)}.nii.gz" for number, phrase in enumerate(masks, 1)]
        for file, mask in zip(names, masks.values(), strict=True):
            write_nifti_mask(folder / file, study, mask)
        return names
    if name == "coco":
        write_coco(folder / "masks_coco.json", study.values.shape[:3], masks)
        return ["masks_coco.json"]
    if not found:
        return []
    if name in ("seg", "labelmap"):
        labelmap = name == "labelmap"
        write_dicom_seg(folder / f"{name}.dcm", study, found, labelmap=labelmap, deidentify=deidentify)
        return [f"{name}.dcm"]
    if name == "rtstruct":
        write_rtstruct(folder / "rtstruct.dcm", study, found, deidentify=deidentify)
        return ["rtstruct.dcm"]
    if name == "sc":
        return write_secondary_captures(folder, study, found, window, deidentify=deidentify)
    names = []
    for index, picture in draw_slices(study, found, window, upright(study)):
        names.append(f"overlay_{index + 1:04d}.png")
        picture.save(folder / names[-1])
    return names


def _slug(phrase: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", phrase.lower()).strip("_")[:40] or "region"
