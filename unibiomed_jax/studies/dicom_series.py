"""DICOM series: which frames make a volume, in which order, and what speaks against it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.studies.dicom_files import DicomFile, Frame
from unibiomed_jax.studies.dicom_pixels import own_windows, read_values
from unibiomed_jax.studies.series import Series
from unibiomed_jax.studies.study import (
    NO_AIR,
    PERPENDICULAR,
    SAME_PLACE,
    Aliases,
    DicomSource,
    Geometry,
    Study,
)
from unibiomed_jax.studies.suv import suv_factor

# Directions of an orientation that differ by less are one.
_SAME_COSINES = 1e-3
# What tells volumes apart that share their positions: words for it, functional group, attribute.
_CONTENTS = (
    ("stack", "FrameContentSequence", "StackID"),
    ("echo time", "MREchoSequence", "EffectiveEchoTime"),
    ("echo time", "", "EchoTime"),
    ("echo", "", "EchoNumbers"),
    ("time point", "FrameContentSequence", "TemporalPositionIndex"),
    ("time point", "", "TemporalPositionIdentifier"),
    ("trigger time", "", "TriggerTime"),
    ("b-value", "MRDiffusionSequence", "DiffusionBValue"),
    ("b-value", "", "DiffusionBValue"),
    ("gradient direction", "", "DiffusionGradientOrientation"),
    ("image type", "", "ImageType"),
    ("acquisition", "", "AcquisitionNumber"),
)


def find_dicom_series(files: Sequence[DicomFile], aliases: Aliases, left_out: list[str]) -> list[Series]:
    """The volumes, films and pictures that objects with images make, in the order of the files.

    A series that cannot be understood is told in `left_out`, a sentence each.
    """
    groups: dict[str, list[DicomFile]] = {}
    for number, file in enumerate(files):
        groups.setdefault(str(file.header.get("SeriesInstanceUID") or f"no UID {number}"), []).append(file)
    found: list[Series] = []
    for uid, members in groups.items():
        name = aliases.series(uid)
        try:
            found += _series_of(name, members, aliases)
        except Exception as error:  # an attribute of an impossible value raises wherever it is used
            left_out.append(impossible(name, error))
    return found


def impossible(name: str, error: Exception) -> str:
    """The sentence for a series whose attributes have impossible values; without the values."""
    return f"{name} has attributes that cannot be understood ({type(error).__name__}); export it again."


def _series_of(name: str, files: list[DicomFile], aliases: Aliases) -> list[Series]:
    """All series that one SeriesInstanceUID stands for."""
    notes: list[str] = []
    single: dict[str, DicomFile] = {}
    for number, file in enumerate(files):
        single.setdefault(str(file.header.get("SOPInstanceUID") or f"no UID {number}"), file)
    if len(single) < len(files):
        notes.append(f"copies of the same images left out: {len(files) - len(single)}")
    frames = [Frame(file, number) for file in single.values() for number in range(file.frames)]
    scouts = [frame for frame in frames if _is_scout(frame)]
    if scouts and len(scouts) < len(frames):
        frames = [frame for frame in frames if not _is_scout(frame)]
        notes.append(f"localizer images left out: {len(scouts)}")

    parts: list[tuple[str, list[Frame]]] = []
    stacks = _alike(frames)
    for number, stack in enumerate(stacks, 1):
        word = f"stack {number} of {len(stacks)}" if len(stacks) > 1 else ""
        if stack[0].origin is None or stack[0].cosines is None or stack[0].spacing is None:
            # Without places each file is a picture, or a film of its own.
            pictures: dict[int, list[Frame]] = defaultdict(list)
            for frame in stack:
                pictures[id(frame.file)].append(frame)
            many = len(pictures) > 1
            parts += [
                (_join(word, f"image {index} of {len(pictures)}" if many else ""), film)
                for index, film in enumerate(pictures.values(), 1)
            ]
        else:
            parts += [(_join(word, content), volume) for content, volume in _split_repeated(stack)]
    return [
        _part(
            name if len(parts) == 1 else f"{name}/{number}",
            aliases,
            [*([words] if words else []), *notes],
            part,
        )
        for number, (words, part) in enumerate(parts, 1)
    ]


def _part(name: str, aliases: Aliases, notes: list[str], frames: list[Frame]) -> Series:
    """One volume, film or picture as a line of the list and a way to open it."""
    first = frames[0]
    header = first.file.header
    modality = str(header.get("Modality") or "unknown")
    geometry, refusal = None, None
    if _is_scout(first):
        refusal = f"{name} holds nothing but localizers; choose the series that was planned on them."
    if first.origin is not None and first.cosines is not None and first.spacing is not None:
        try:
            frames, geometry, found = _stack(name, frames)
            notes = [*notes, *found]
        except InputError as error:
            refusal = refusal or str(error)
    elif len(frames) > 1:
        notes.append("frames in time, of no known place")
    else:
        notes.append("a picture of no known place")
    if modality in ("US", "XC", "ES", "OT", "SC") and header.get("BurnedInAnnotation") != "NO":
        notes.append("text in the pixels may name the patient")
    body_part = str(header.get("BodyPartExamined") or "")
    study_alias = aliases.study(str(header.get("StudyInstanceUID") or name))

    def load() -> Study:
        return _open(frames, geometry, name, study_alias, modality, body_part, tuple(notes))

    return Series(
        alias=name,
        uid=str(header.get("SeriesInstanceUID") or ""),
        modality=modality,
        body_part=body_part,
        shape=(len(frames), int(header.Rows), int(header.Columns)),
        plane=None if geometry is None else geometry.plane,
        spacing=None if geometry is None else geometry.spacing,
        notes=tuple(notes),
        refusal=refusal,
        load=load,
    )


def _open(
    frames: list[Frame],
    geometry: Geometry | None,
    name: str,
    study_alias: str,
    modality: str,
    body_part: str,
    notes: tuple[str, ...],
) -> Study:
    if geometry is not None:
        values, padding, kept = _without_doubles(frames, name)
        if len(kept) < len(frames):
            notes = (*notes, "they have the same pixels and were left out")
            frames = [frames[index] for index in kept]
            geometry = Geometry(
                np.stack([frame.origin for frame in frames]),
                geometry.across,
                geometry.down,
                geometry.thickness,
            )
    else:
        values, padding = read_values(frames, name)
    windows = () if values.ndim == 4 else own_windows(frames[0])
    unit = "HU" if modality == "CT" else ""
    if modality == "CT" and values.min() >= 0:
        notes = (*notes, NO_AIR)
    if modality == "PT" and values.ndim == 3:
        factor, reason = suv_factor(frames)
        if factor is None:
            unit, _, why = reason.partition(";")
            notes = (*notes, f"no SUV:{why}")
        else:
            unit = "SUV"
            values *= np.float32(factor)
            windows = tuple(window.scaled(factor) for window in windows)
    return Study(
        values=values,
        modality=modality,
        unit=unit,
        geometry=geometry,
        study_alias=study_alias,
        series_alias=name,
        notes=notes,
        padding=padding,
        own_windows=windows,
        white_is_low=frames[0].file.header.get("PhotometricInterpretation") == "MONOCHROME1",
        body_part=body_part,
        source=DicomSource(tuple(frames)),
    )


def _stack(name: str, frames: list[Frame]) -> tuple[list[Frame], Geometry, list[str]]:
    """Frames sorted along their normal, where they lie, and what is odd about it.

    Raises:
        InputError: orientation or spacing are impossible, or the frames do not follow each other.
    """
    first = frames[0]
    rows, columns = first.cosines[:3], first.cosines[3:]
    if (
        abs(np.linalg.norm(rows) - 1) > 0.01
        or abs(np.linalg.norm(columns) - 1) > 0.01
        or abs(rows @ columns) > PERPENDICULAR
        or not (first.spacing > 0).all()
    ):
        raise InputError(
            f"{name} has an impossible orientation or spacing; export it again from the archive."
        )
    thickness = _thickness(first)
    geometry = Geometry(
        np.zeros((1, 3)), rows * first.spacing[1], columns * first.spacing[0], thickness or 1.0
    )
    frames = sorted(frames, key=lambda frame: (frame.origin @ geometry.normal, frame.number))
    origins = np.stack([frame.origin for frame in frames])
    along = origins @ geometry.normal
    distinct = np.r_[True, np.linalg.norm(np.diff(origins, axis=0), axis=1) > SAME_PLACE]
    if (np.diff(along[distinct]) <= SAME_PLACE).any():
        raise InputError(
            f"{name} has slices side by side in one plane, which make no volume; give a series of parallel "
            "slices."
        )
    notes = []
    if thickness is None and len(frames) == 1:
        notes.append("the thickness of the only slice is not stated: taken as 1 mm")
    geometry = Geometry(origins[distinct], geometry.across, geometry.down, geometry.thickness)
    if len(geometry.uneven):
        notes.append(uneven_places(geometry))
    if geometry.is_tilted:
        notes.append(f"tilted: each slice is shifted by {geometry.tilt:.2f} mm in its plane")
    if not distinct.all():
        notes.append(f"images at the place of another: {(~distinct).sum()}")
    return frames, geometry, notes


def uneven_places(geometry: Geometry) -> str:
    """Where slices are missing or out of step, for notes and refusals."""
    along = geometry.origins @ geometry.normal
    steps, usual = np.diff(along), float(geometry.step @ geometry.normal)
    index = geometry.uneven[0]
    more = f" and {len(geometry.uneven) - 1} more" if len(geometry.uneven) > 1 else ""
    return (
        f"uneven: {steps[index]:.2f} mm instead of {usual:.2f} mm after slice {index + 1} (position "
        f"{along[index]:.2f} mm){more}"
    )


def _without_doubles(frames: list[Frame], name: str) -> tuple[np.ndarray, np.ndarray | None, list[int]]:
    """Values and padding without frames that repeat place and pixels of the one before, and which are left.

    Raises:
        InputError: two frames of one place differ, or one cannot be read.
    """
    values, padding = read_values(frames, name)
    kept = [0]
    for index in range(1, len(frames)):
        before, frame = frames[kept[-1]], frames[index]
        if np.linalg.norm(frame.origin - before.origin) > SAME_PLACE:
            kept.append(index)
        elif not np.array_equal(values[index], values[kept[-1]]):
            at = ", ".join(f"{number:g}" for number in frame.origin)
            raise InputError(
                f"{name} has two different images at one place ({before} and {frame}, at {at} mm); keep one "
                "of them."
            )
    if len(kept) < len(frames):
        values, padding = values[kept], None if padding is None else padding[kept]
    return values, padding, kept


def _alike(frames: list[Frame]) -> list[list[Frame]]:
    """Frames by patient, study, kind, size, spacing, orientation and frame of reference."""
    groups: list[tuple[tuple, np.ndarray, list[Frame]]] = []
    for frame in frames:
        header = frame.file.header
        kind = (
            header.get("SOPClassUID"), header.get("Modality"), header.Rows, header.Columns,
            header.get("SamplesPerPixel"), header.get("PhotometricInterpretation"),
            header.get("FrameOfReferenceUID"), frame.origin is None or frame.cosines is None,
            # Copied or made-up series UIDs must not mix patients.
            header.get("PatientID"), header.get("StudyInstanceUID"),
        )  # fmt: skip
        place = np.r_[
            np.zeros(6) if frame.cosines is None else frame.cosines,
            np.zeros(2) if frame.spacing is None else frame.spacing,
        ]
        for other, where, members in groups:
            if kind == other and np.abs(place - where).max() <= _SAME_COSINES:
                members.append(frame)
                break
        else:
            groups.append((kind, place, [frame]))
    return [members for _, _, members in groups]


def _split_repeated(frames: list[Frame]) -> list[tuple[str, list[Frame]]]:
    """A stack by what tells frames of the same places apart; whole if no place repeats, or nothing does."""
    places = _places(frames)
    if len(places) == len(frames):
        return [("", frames)]
    choices = [(contents,) for contents in _CONTENTS] + [_CONTENTS]
    for attributes in choices:
        groups: dict[Hashable, list[Frame]] = {}
        for frame in frames:
            groups.setdefault(tuple(_content(frame, *place) for _, *place in attributes), []).append(frame)
        # A volume of one slice is right only where all frames share one place.
        if len(groups) > 1 and all(
            len(_places(group)) == len(group) >= min(2, len(places)) for group in groups.values()
        ):
            words = attributes[0][0] if len(attributes) == 1 else "volume"
            return [
                (f"{words} {number} of {len(groups)}", group)
                for number, group in enumerate(groups.values(), 1)
            ]
    return [("", frames)]


def _places(frames: list[Frame]) -> set[tuple[float, ...]]:
    return {tuple(np.round(frame.origin, 2) + 0.0) for frame in frames}


def _content(frame: Frame, group: str, attribute: str) -> Any:
    value = (
        frame.file.attribute(group, attribute, frame.number) if group else frame.file.header.get(attribute)
    )
    return None if value is None else str(value)


def _is_scout(frame: Frame) -> bool:
    return bool({"LOCALIZER", "SCOUT"} & set(frame.image_type))


def _thickness(frame: Frame) -> float | None:
    """What a lone slice stands for, mm, if it is stated; of several the positions tell."""
    try:
        value = float(frame.file.attribute("PixelMeasuresSequence", "SliceThickness", frame.number) or 0)
    except (TypeError, ValueError):
        value = 0.0
    return value if 0 < value < np.inf else None


def _join(*words: str) -> str:
    return ", ".join(filter(None, words))
