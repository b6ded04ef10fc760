"""From a path to the series that lie there, and one of them opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from unibiomed_jax.errors import DamagedError, InputError
from unibiomed_jax.files import shown
from unibiomed_jax.inputs.images import by_number, open_image
from unibiomed_jax.studies.dicom_files import (
    DicomFile,
    as_image,
    is_dicom,
    quietly,
    read_header,
    require_pydicom,
)
from unibiomed_jax.studies.dicom_series import find_dicom_series, impossible
from unibiomed_jax.studies.place import Place
from unibiomed_jax.studies.series import Series
from unibiomed_jax.studies.study import NO_AIR, Aliases, Study
from unibiomed_jax.studies.volume_files import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    find_itk_series,
    find_nifti_series,
)

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class Listing:
    """What was found at a path."""

    series: tuple[Series, ...]
    # Why a file was left out, a sentence each.
    left_out: tuple[str, ...]
    # Those of them that are about damage, and not about another kind of file.
    damaged: tuple[str, ...] = ()


def open_study(
    path: str | os.PathLike, series: str | int | None = None, *, modality: str | None = None
) -> Study:
    """Read a series of a patient's study, or a single volume or picture.

    Messages name files by their number and series by an alias, never by a path or a patient's name.

    Args:
        path: a DICOM file, a folder of them (nested, with others in it, without suffixes), a DICOMDIR; a
            NIfTI, NRRD or MetaImage file; a PNG, JPEG or TIFF picture.
        series: which of several: its number in the list (from 1), its alias, or its SeriesInstanceUID.
        modality: of a file that does not say it (NIfTI, NRRD, pictures): CT, MR, PT, US, ... as in DICOM. The
            values of one that is said to be CT are taken as HU. It is not guessed: MR has negative values,
            too, where it was filtered.

    Raises:
        InputError: nothing usable lies there; several series do and none was chosen (the message lists them);
            the one chosen cannot be opened, for the reason given, or is of another modality than stated.
    """
    listing = list_series(path)
    return replace(open_series(choose_series(listing, series), modality), left_out=listing.left_out)


def choose_series(listing: Listing, wanted: str | int | None) -> Series:
    """The series of a list that is meant: by its number from 1, its alias or its UID, or the only usable one.

    Raises:
        InputError: there is none, or several and none is chosen (the message lists them).
    """
    found = listing.series
    if not found:
        raise InputError(_nothing(listing))
    if wanted is not None:
        return _find(found, str(wanted))
    usable = [candidate for candidate in found if candidate.refusal is None]
    if len(usable) > 1:
        raise InputError(
            f"There are {len(found)} series: {_choices(found)}; choose one with series= (--series)."
        )
    return (usable or found)[0]


def open_series(chosen: Series, modality: str | None = None) -> Study:
    """Read a series of a list; see `open_study`.

    Raises:
        InputError: it cannot be opened, or is of another modality than stated.
    """
    if chosen.refusal is not None:
        raise InputError(chosen.refusal)
    try:
        with quietly():
            return _stated(chosen.load(), modality)
    except (InputError, MemoryError):
        raise
    except OSError as error:  # whose own message names the path
        raise InputError(f"{chosen.alias} cannot be read ({error.strerror}); check the disk.") from None
    except Exception as error:  # an attribute of an impossible value raises wherever it is used
        raise InputError(impossible(chosen.alias, error)) from None


# Modalities of pictures that DICOM knows (PS3.3, C.7.3.1.1.1).
MODALITIES = (
    *("BI", "CR", "CT", "DG", "DX", "ES", "GM", "IO", "IVOCT", "IVUS", "MG", "MR", "NM", "OCT", "OP", "OPT"),
    *("OT", "PT", "PX", "RF", "RG", "SC", "SM", "TG", "US", "XA", "XC"),
)


def require_modality(modality: str | None) -> None:
    """Refuse what is no code of DICOM; None states nothing.

    Raises:
        InputError: names the codes.
    """
    if modality is not None and modality not in MODALITIES:
        raise InputError(
            f"{shown(modality)!r} is no modality; give one of DICOM's codes: {', '.join(MODALITIES)}."
        )


def _stated(study: Study, modality: str | None) -> Study:
    """The study, of the modality that is stated for it.

    Raises:
        InputError: the file itself says another one.
    """
    if modality is None or modality == study.modality:
        return study
    require_modality(modality)
    if study.modality != "unknown":
        raise InputError(f"{study.series_alias} is {study.modality}, not {modality}; leave the modality out.")
    ct = modality == "CT" and not study.is_colour
    notes = (*study.notes, NO_AIR) if ct and study.values.min() >= 0 else study.notes
    return replace(study, modality=modality, unit="HU" if ct else "", notes=notes)


def list_series(path: str | os.PathLike) -> Listing:
    """The series at a path, in the order of the names of their files, without decoding pixels.

    Raises:
        InputError: the path does not exist or cannot be read, or an extra package is missing.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise InputError("There is nothing at the path given; check it.")
    left_out: list[str] = []
    damaged: list[str] = []
    dicom: list[DicomFile] = []
    rest: list[Place] = []
    for place in _places(path, left_out, damaged):
        with _told(place, left_out, damaged):
            if not is_dicom(place.path):
                rest.append(place)
                continue
            require_pydicom()
            header = read_header(place)
            if "DirectoryRecordSequence" not in header:
                dicom.append(as_image(place, header))
            elif place.number is None:  # in a folder its files are found without it
                dicom += _recorded(place, header.DirectoryRecordSequence, left_out, damaged)
    aliases, broken = Aliases(), list[str]()
    with quietly():
        found = find_dicom_series(dicom, aliases, broken)
    for place in rest:
        with _told(place, left_out, damaged):
            found += _others(place, aliases)
    return Listing(tuple(found), (*left_out, *broken), (*damaged, *broken))


@contextmanager
def _told(place: Place, left_out: list[str], damaged: list[str]) -> Iterator[None]:
    """Note why a file cannot be used, and go on."""
    try:
        yield
    except OSError as error:
        damaged.append(f"{place} cannot be read ({error.strerror}); change its permissions.")
        left_out.append(damaged[-1])
    except InputError as error:
        left_out.append(str(error))
        damaged += [str(error)] if isinstance(error, DamagedError) else []


def _places(path: Path, left_out: list[str], damaged: list[str]) -> Iterator[Place]:
    """The files of a folder and of those in it that are not hidden, or the file itself."""
    if not path.is_dir():
        if not path.is_file():
            raise InputError("The path given is no ordinary file; copy it to a disk first.")
        yield Place(path)
        return
    root = path.resolve()
    number = 0

    def refuse(error: OSError) -> None:
        damaged.append(f"A folder cannot be read ({error.strerror}); change its permissions.")
        left_out.append(damaged[-1])

    for folder, folders, files in os.walk(path, onerror=refuse):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=by_number)
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        left_out += ["A folder is a link, which is not followed; name what it points to."] * len(linked)
        for name in sorted(files, key=by_number):
            if name.startswith("."):
                continue
            number += 1
            place = Place(Path(folder) / name, number)
            if place.path.is_symlink() and not place.path.resolve().is_relative_to(root):
                left_out.append(f"{place} is a link out of the folder; copy what it points to.")
            elif not place.path.is_file():
                left_out.append(f"{place} is no ordinary file; copy it again.")
            else:
                yield place


def _recorded(
    place: Place, records: Sequence[Dataset], left_out: list[str], damaged: list[str]
) -> list[DicomFile]:
    """The images that the records of a DICOMDIR name."""
    root = place.path.parent.resolve()
    files, missing = [], 0
    names = [record.get("ReferencedFileID") for record in records]
    for number, parts in enumerate(filter(None, names), 1):
        path = root.joinpath(*([parts] if isinstance(parts, str) else parts))
        if not path.resolve().is_relative_to(root):
            raise InputError("The DICOMDIR lists files outside its folder; name the folder of the images.")
        if not path.is_file():
            missing += 1
            continue
        listed = Place(path, number, listed=True)
        with _told(listed, left_out, damaged):
            files.append(as_image(listed, read_header(listed)))
    if missing:
        damaged.append(f"{missing} files that the DICOMDIR lists are missing; copy them beside it.")
        left_out.append(damaged[-1])
    return files


def _others(place: Place, aliases: Aliases) -> list[Series]:
    """The series of a file that is not DICOM.

    Raises:
        InputError: it is no picture and no volume.
    """
    name = place.path.name.lower()
    if place.path.stat().st_size == 0:
        raise DamagedError(f"{place} is empty; copy it again from its source.")
    if name.endswith(NIFTI_SUFFIXES):
        return find_nifti_series(place, aliases)
    if name.endswith(ITK_SUFFIXES):
        return find_itk_series(place, aliases)
    try:
        with Image.open(place.path) as image:
            width, height = image.size
    except Exception:  # Pillow's plugins raise whatever their parser met
        raise InputError(f"{place} is no DICOM, volume or picture; leave it out.") from None
    return [_picture(place, aliases, width, height)]


def _picture(place: Place, aliases: Aliases, width: int, height: int) -> Series:
    """A picture, without a place in the patient."""
    name, study_alias = aliases.series(str(place.path)), aliases.study(str(place.path))

    def load() -> Study:
        try:
            image, record = open_image(place.path)
        except InputError as error:  # which names the path
            reason = str(error).replace(shown(place.path), str(place))
            raise InputError(reason) from None
        return Study(
            values=np.asarray(image)[None],
            modality="unknown",
            unit="",
            geometry=None,
            study_alias=study_alias,
            series_alias=name,
            notes=("a picture of no known place", *record.steps),
        )

    return Series(
        alias=name,
        uid="",
        modality="unknown",
        body_part="",
        shape=(1, height, width),
        plane=None,
        spacing=None,
        notes=("a picture of no known place",),
        refusal=None,
        load=load,
    )


def _find(found: tuple[Series, ...], wanted: str) -> Series:
    # One that has parts is named by what stands before their numbers, too.
    named = [
        series
        for series in found
        if wanted and wanted in (series.alias, series.alias.split("/")[0], series.uid)
    ]
    if wanted.isdecimal() and 1 <= int(wanted) <= len(found):
        named = [found[int(wanted) - 1]]
    if not named:
        raise InputError(f"There is no series {wanted!r}; choose one of {_choices(found)}.")
    if len(named) > 1:
        raise InputError(f"That series has {len(named)} parts; choose one of {_choices(found, named)}.")
    return named[0]


def _choices(found: Sequence[Series], among: Sequence[Series] | None = None) -> str:
    """The series by their numbers in the list, of all or of some of them."""
    return "; ".join(
        f"{number}: {describe(series)}"
        for number, series in enumerate(found, 1)
        if among is None or series in among
    )


def describe(series: Series) -> str:
    """A series in a phrase: alias, modality, plane, size."""
    slices, rows, columns = series.shape
    plane = f" {series.plane}" if series.plane else ""
    return f"{series.alias} ({series.modality}{plane}, {slices} x {rows} x {columns})"


def _nothing(listing: Listing) -> str:
    if not listing.left_out:
        return "No images lie there; check the path."
    first, *rest = listing.left_out
    return first if not rest else f"None of {len(listing.left_out)} files can be used; the first: {first}"
