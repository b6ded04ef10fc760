"""Masks as a DICOM Segmentation that refers to the images it was drawn on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.masks.overlay import NOTICE
from unibiomed_jax.outputs import dicom_objects
from unibiomed_jax.outputs.coded_terms import Code, find_term
from unibiomed_jax.outputs.deidentify import Deidentifier
from unibiomed_jax.studies.dicom_files import Frame
from unibiomed_jax.studies.study import Study

if TYPE_CHECKING:
    from pydicom import Dataset

_BY_FRAME = ("NumberOfFrames", "PerFrameFunctionalGroupsSequence")


def write_dicom_seg(
    path: Path,
    study: Study,
    masks: Mapping[str, np.ndarray],
    *,
    labelmap: bool = False,
    deidentify: Deidentifier | None = None,
) -> None:
    """Write a Segmentation with a segment for each phrase.

    Args:
        path: of the new file.
        study: from DICOM.
        masks: phrase -> (slices, rows, columns) bool, none of them empty.
        labelmap: one number a pixel (Label Map Segmentation, which older viewers do not show) instead of one
            bit for each pixel and segment.
        deidentify: takes the patient out of it.

    Raises:
        InputError: the study is not from DICOM, its attributes are incomplete, or masks of a label map
            overlap.
    """
    frames = dicom_objects.dicom_frames(study, "DICOM-SEG")
    stacked = np.stack([mask.astype(bool) for mask in masks.values()], axis=-1)
    if labelmap and (stacked.sum(-1) > 1).any():
        raise InputError("Masks overlap, which a label map cannot hold; write 'seg' instead of 'labelmap'.")
    with dicom_objects.written(study, "DICOM-SEG"):
        import highdicom

        if frames[0].file.frames > 1:
            if study.geometry is None:
                raise InputError(
                    f"{study.series_alias} is a film of no known place, which DICOM-SEG cannot hold; write "
                    "'sc' or 'png'."
                )
            objects = len({id(frame.file) for frame in frames})
            if objects > 1:
                raise InputError(
                    f"{study.series_alias} is spread over {objects} multi-frame objects, which DICOM-SEG "
                    "cannot refer to as one; write NIfTI or RTSTRUCT."
                )
            sources = [_shortened(frames)]
        else:
            sources = [dicom_objects.source_header(frame.file.header) for frame in frames]
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=_numbers(stacked) if labelmap else stacked.astype(np.uint8),
            segmentation_type="LABELMAP" if labelmap else "BINARY",
            segment_descriptions=[_describe(number, phrase) for number, phrase in enumerate(masks, 1)],
            series_instance_uid=dicom_objects.new_uid(),
            series_number=dicom_objects.SERIES_NUMBER,
            sop_instance_uid=dicom_objects.new_uid(),
            instance_number=1,
            content_label="UNIBIOMED",
            content_description=NOTICE[: dicom_objects.LONG],
            omit_empty_frames=True,
            series_description="UniBiomed segmentation",
            **dicom_objects.maker(),
        )
        if frames[0].file.frames > 1:
            _name_frames(segmentation, frames)
        dicom_objects.save(segmentation, path, deidentify)


def _shortened(frames: Sequence[Frame]) -> Dataset:
    """The header of a multi-frame object as if it held the frames of the study alone, in their order.

    highdicom takes no object with two frames at one place, such as those of two times.
    """
    header = dicom_objects.source_header(frames[0].file.header)
    groups = header.get("PerFrameFunctionalGroupsSequence")
    # Elements are shared with the whole header: those that differ are left out, and new.
    for name in _BY_FRAME:
        if name in header:
            del header[name]
    header.NumberOfFrames = len(frames)
    if groups is not None:
        header.PerFrameFunctionalGroupsSequence = [groups[frame.number] for frame in frames]
    return header


def _name_frames(segmentation: Dataset, frames: Sequence[Frame]) -> None:
    """Let each frame refer to the frames of the object itself, not to those of the shortened header."""
    sources = {  # segments of one place share the item that names their image
        id(source): source
        for groups in segmentation.PerFrameFunctionalGroupsSequence
        for derivation in groups.get("DerivationImageSequence") or ()
        for source in derivation.SourceImageSequence
    }
    for source in sources.values():
        source.ReferencedFrameNumber = frames[source.ReferencedFrameNumber - 1].number + 1


def _numbers(pixels: np.ndarray) -> np.ndarray:
    """(..., segments) bool as the number of the one segment, from 1, or 0."""
    return (pixels * np.arange(1, pixels.shape[-1] + 1, dtype=np.uint16)).sum(-1, dtype=np.uint16)


def _describe(number: int, phrase: str):
    import highdicom
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    def concept(code: Code) -> CodedConcept:
        return CodedConcept(code[0], "SCT", code[1])

    term = find_term(phrase)
    if term.property_type is None:  # a code of our own, which says nothing that the phrase does not say
        meaning = dicom_objects.label(phrase)
        value = hashlib.blake2b(meaning.encode(), digest_size=dicom_objects.SHORT // 2).hexdigest().upper()
        property_type = CodedConcept(value, "99UNIBIOMED", meaning)
    else:
        property_type = concept(term.property_type)
    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=dicom_objects.label(phrase),
        segmented_property_category=concept(term.category),
        segmented_property_type=property_type,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="UniBiomed",
            version=version(dicom_objects.MAKER),
            family=codes.cid7162.ArtificialIntelligence,
        ),
        tracking_uid=dicom_objects.new_uid(),
        tracking_id=f"{number} {phrase}"[: dicom_objects.LONG],
        anatomic_regions=None if term.region is None else [concept(term.region)],
    )
    if term.side is not None:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            concept(term.side)
        ]
    description.SegmentDescription = "research use only"
    return description
