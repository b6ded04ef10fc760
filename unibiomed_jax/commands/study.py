"""`unibiomed study`: what lies in a folder from the archive."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.config.preprocessing import PREPROCESSING, Preprocessing
from unibiomed_jax.errors import InputError

if TYPE_CHECKING:
    from unibiomed_jax.studies.opening import Listing
    from unibiomed_jax.studies.series import Series

console = Console()
# Files left out of which the reason is printed; all are counted.
NAMED = 20


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """List the series of a DICOM study, a volume (NIfTI, NRRD, MetaImage) or a picture."""

    # A file, a folder (its subfolders included), or a DICOMDIR.
    path: Annotated[Path, tyro.conf.Positional]
    # Print the series, what is odd about them, and the window each would be shown in.
    list: bool = False
    # Whose windows: of the released weights or of unibiomed-tiny.
    preprocessing: Literal["released", "tiny"] = "released"


def study(options: StudyOptions) -> int:
    """Run `unibiomed study`; FAILED_IN_PART if a series cannot be opened."""
    from unibiomed_jax.studies.opening import list_series  # pydicom, only when it is needed

    if not options.list:
        raise InputError(
            "This command lists series and asks nothing: add --list; in Python, unibiomed_jax.open_study has "
            "their values and write_study their masks."
        )
    listing = list_series(options.path)
    if not listing.series:
        _say_left_out(listing)
        raise InputError("No series lies there; give a folder or a file with images.")
    table = Table(
        "", "series", "modality", "plane", "slices", "rows x columns", "spacing, mm", "window", "notes"
    )
    for number, series in enumerate(listing.series, 1):
        slices, height, width = series.shape
        table.add_row(
            str(number),
            series.alias,
            escape(series.modality),
            series.plane or "",
            str(slices),
            f"{height} x {width}",
            " x ".join(f"{length:.4g}" for length in series.spacing or ()),
            _window(series, PREPROCESSING[options.preprocessing]),
            escape(series.refusal or "; ".join(series.notes)),
        )
    console.print(table)
    _say_left_out(listing)
    return FAILED_IN_PART if any(series.refusal for series in listing.series) else DONE


def _window(series: Series, preprocessing: Preprocessing) -> str:
    """The window that would be used, as far as it can be told before the values are read."""
    from unibiomed_jax.studies.grey import ct_preset

    if series.modality == "CT":
        name = ct_preset(series.body_part, preprocessing)
        return name or f"to be stated: {', '.join(preset.name for preset in preprocessing.ct_windows)}"
    if series.modality == "PT" and preprocessing.suv_window is not None:
        return "SUV {:g} to {:g}, or percentiles".format(*preprocessing.suv_window)
    if series.modality in ("MR", "PT", "NM"):
        return "percentiles"
    return "by its values" if series.modality == "unknown" else "the file's own, or as stored"


def _say_left_out(listing: Listing) -> None:
    for reason in listing.left_out[:NAMED]:
        _say(f"Left out: {reason}")
    if listing.left_out:
        _say(f"{len(listing.series)} series; {len(listing.left_out)} files left out.")


def _say(sentence: str) -> None:
    console.print(escape(sentence), highlight=False, soft_wrap=True)
