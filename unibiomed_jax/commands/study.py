"""`unibiomed study`: what lies in a folder from the archive, and a question about it."""

from __future__ import annotations

import dataclasses
import glob
import json
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from unibiomed_jax.commands.model import load_model
from unibiomed_jax.commands.progress import progress_bar
from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.config.precision import PrecisionName
from unibiomed_jax.config.preprocessing import PREPROCESSING, Preprocessing
from unibiomed_jax.errors import DiskFullError, InputError
from unibiomed_jax.files import delete_folder, shown

if TYPE_CHECKING:
    from unibiomed_jax.inference.predictor import UniBiomed
    from unibiomed_jax.inference.study_answer import StudyAnswer
    from unibiomed_jax.inference.study_question import StudyQuestion
    from unibiomed_jax.outputs.deidentify import Deidentifier
    from unibiomed_jax.studies.opening import Listing
    from unibiomed_jax.studies.series import Series
    from unibiomed_jax.studies.study import Study

console = Console()
errors = Console(stderr=True)
# Files left out of which the reason is printed; all are counted.
NAMED = 20
# What stands for every series in --series.
ALL = "all"
# What else the list says.
COLUMNS = ("modality", "plane", "slices", "rows x columns", "spacing, mm", "window", "notes")
# The window of a series of which nothing says it.
TO_BE_STATED = "to be stated"


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """List the series of a DICOM study, a volume (NIfTI, NRRD, MetaImage) or a picture, or ask about them."""

    # A file, a folder (its subfolders included), or a DICOMDIR.
    path: Annotated[Path, tyro.conf.Positional]
    # Print the series, what is odd about them, and the window each would be shown in; ask nothing.
    list: bool = False
    # The question, such as "Please segment the liver in {site}."; {site} becomes the words that stood with
    # the window in training.
    ask: str | None = None
    # Where the answer goes: a new folder; of several series a folder in it for each.
    out: Path | None = None
    # A converted or a released folder, or a repository on Hugging Face.
    checkpoint: Annotated[str | Path | None, tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")] = None
    # Which series to ask about, where there are several: numbers of the list, aliases, SeriesInstanceUIDs,
    # or "all".
    series: tuple[str, ...] = ()
    # Of files that do not say it (NIfTI, NRRD, pictures): CT, MR, PT, US, ... as in DICOM.
    modality: str | None = None
    # A name of the checkpoint's windows, "own" (the file's), "percentile", or two numbers: black and white.
    # By default what the checkpoint saw of such studies.
    window: tuple[str, ...] = ()
    # Slices that the language model sees; the others are followed from there, both ways. "auto": chosen by a
    # first pass over all; "first": as the reference; "each": all, one by one; or numbers from 1.
    conditioning: tuple[str, ...] = ("auto",)
    # What to write: nifti, seg, labelmap, rtstruct, sc, png, coco, html. By default nifti, seg (of DICOM) and
    # html, as far as the study allows.
    formats: tuple[str, ...] = ()
    # Take the patient out of the DICOM objects written, too: they then refer to images no archive has. This
    # claims no conformance to a de-identification profile.
    deidentify: bool = False
    # Keep so many connected parts of a mask, the largest ones.
    parts: int | None = None
    # Leave out connected parts of less volume, ml.
    smallest_ml: float | None = None
    # Empty masks, slice by slice, of what the model itself thinks is absent (score not above 0).
    hide_absent: bool = False
    # Longest answer, tokens.
    max_new_tokens: int = 256
    # Stop an answer with this many masks.
    max_masks: int | None = None
    # Slices of the first pass in one call; takes the memory of the next power of two.
    batch_size: int = 4
    # "auto": bfloat16, as the reference; float32 on a CPU. "fast": coarser, where a CPU multiplies bfloat16.
    precision: PrecisionName = "auto"


def study(options: StudyOptions) -> int:
    """Run `unibiomed study`; FAILED_IN_PART if a file is damaged or a series failed."""
    if options.list == (options.ask is not None):
        raise InputError(
            "Give either --list, which lists the series, or --ask with a question about them (with "
            "--checkpoint and --out)."
        )
    return _list(options) if options.list else _ask(options)


# ------------------------------------------------------------------------------------------------------ list


def _list(options: StudyOptions) -> int:
    from unibiomed_jax.studies.opening import list_series, require_modality  # pydicom, only when it is needed

    require_modality(options.modality)
    preprocessing = PREPROCESSING["released"]
    if options.checkpoint is not None:
        from unibiomed_jax.conversion import loading

        preprocessing = loading.config_of(options.checkpoint).preprocessing
    listing = list_series(options.path)
    if not listing.series:
        _say_left_out(listing)
        raise InputError("No series lies there; give a folder or a file with images.")
    table = Table(  # numbers and aliases, which --series takes, stay whole on narrow terminals
        *(Column(name, no_wrap=True) for name in ("", "series")),
        *(Column(name, overflow="fold") for name in COLUMNS),
    )
    windows = []
    for number, series in enumerate(listing.series, 1):
        slices, height, width = series.shape
        if series.modality == "unknown" and options.modality is not None:
            series = dataclasses.replace(series, modality=options.modality)
        windows.append(_window(series, preprocessing))
        table.add_row(
            str(number),
            series.alias,
            escape(series.modality),
            series.plane or "",
            str(slices),
            f"{height} x {width}",
            " x ".join(f"{length:.4g}" for length in series.spacing or ()),
            windows[-1],
            escape(series.refusal or "; ".join(series.notes)),
        )
    console.print(table)
    _say(f"Windows are those of the preset {preprocessing.name!r}.")
    if TO_BE_STATED in windows:
        names = ", ".join(preset.name for preset in preprocessing.ct_windows)
        _say(
            f"{TO_BE_STATED.capitalize()}: --window with one of {names}, own, percentile, or two numbers; "
            "where the modality is unknown, --modality may do. Pictures in colour need neither."
        )
    _say_left_out(listing)
    failed = bool(listing.damaged) or any(series.refusal for series in listing.series)
    return FAILED_IN_PART if failed else DONE


def _window(series: Series, preprocessing: Preprocessing) -> str:
    """The window that would be used, as far as it can be told before the values are read."""
    from unibiomed_jax.studies.grey import ct_preset

    if series.modality == "CT":
        return ct_preset(series.body_part, preprocessing) or TO_BE_STATED
    if series.modality == "PT" and preprocessing.suv_window is not None:
        return "SUV {:g} to {:g}, or percentiles".format(*preprocessing.suv_window)
    if series.modality in ("MR", "PT", "NM"):
        return "percentiles"
    return TO_BE_STATED if series.modality == "unknown" else "the file's own, or as stored"


def _say_left_out(listing: Listing) -> None:
    for reason in listing.left_out[:NAMED]:
        _say(f"Left out: {reason}")
    if listing.left_out:
        _say(f"{len(listing.series)} series; {len(listing.left_out)} files left out.")


# ------------------------------------------------------------------------------------------------------- ask


def _ask(options: StudyOptions) -> int:
    from unibiomed_jax.inference.answer import INTENDED_USE
    from unibiomed_jax.studies.opening import choose_series, list_series

    question = _question(options)
    checkpoint = _needed(options.checkpoint, "--checkpoint")
    out = Path(_needed(options.out, "--out")).absolute()  # "." has no name beside which to keep anything
    listing = list_series(options.path)
    if options.series == (ALL,):
        chosen = list(listing.series)
    else:
        chosen = [choose_series(listing, wanted) for wanted in options.series or (None,)]
    folders = _folders(out, chosen)
    model = load_model(checkpoint, console, precision=options.precision)

    failures: dict[str, str] = {}
    deidentifiers: dict[str, Deidentifier] = {}
    for series, folder in zip(chosen, folders, strict=True):
        try:
            _answer_series(model, options, question, series, folder, deidentifiers)
        except DiskFullError:
            raise
        except InputError as error:
            failures[series.alias] = str(error)
        except MemoryError:
            failures[series.alias] = "there is too little memory for it; close other programs."
    _say_left_out(listing)
    for name, reason in failures.items():
        sentence = reason if name in reason else f"{name}: {reason}"
        errors.print(escape(shown(sentence)), style="red", highlight=False, soft_wrap=True)
    _say(f"{len(chosen) - len(failures)} of {len(chosen)} series answered; peak memory {_peak():.2f} GB.")
    console.print(INTENDED_USE, style="italic")
    return FAILED_IN_PART if failures or listing.damaged else DONE


def _answer_series(
    model: UniBiomed,
    options: StudyOptions,
    question: StudyQuestion,
    series: Series,
    folder: Path,
    deidentifiers: dict[str, Deidentifier],
) -> None:
    """Ask about one series and write the answer, unless it lies there.

    `deidentifiers`, by the alias of the study, make series of one study go on belonging together.

    Raises:
        InputError: it cannot be opened, asked about or written.
        DiskFullError: no space is left.
    """
    from unibiomed_jax.inference.study_question import hash_of, request_of
    from unibiomed_jax.outputs.deidentify import Deidentifier, identity_of
    from unibiomed_jax.outputs.study_folder import ANSWER, require_formats, write_study
    from unibiomed_jax.studies.opening import open_series

    opened = open_series(series, options.modality)
    slices, chosen = len(opened.values), question.conditioning
    if not isinstance(chosen, str) and max(chosen) >= slices:
        raise InputError(
            f"--conditioning {max(chosen) + 1} is no slice of {opened.series_alias}; give numbers from 1 to "
            f"{slices}."
        )
    formats = options.formats or _usual_formats(opened)
    wanted = {
        "request": request_of(model, opened, options.ask or "", question),
        "checkpoint": model.checkpoint_hash,
        "study_hash": hash_of(opened),
        "identity": identity_of(options.deidentify),
    }
    partial = folder.with_name(f".{folder.name}.partial")
    if _is_done(folder, wanted, formats, opened, options.deidentify):
        _clear(partial)
        _say(f"{series.alias} is answered already; the same request changes nothing.")
        return
    require_formats(opened, options.formats)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _progress(series.alias) as progress:
        try:
            answer = model.ask_study(
                opened,
                options.ask or "",
                **vars(question),
                batch_size=options.batch_size,
                state=partial,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Stopped; the same command goes on from here.") from None
    alias = opened.study_alias
    deidentify = options.deidentify and deidentifiers.setdefault(alias, Deidentifier(alias))
    write_study(opened, answer, folder, formats, overwrite=True, deidentify=deidentify)
    _clear(partial)
    _show(opened, answer, json.loads((folder / ANSWER).read_text(encoding="utf-8"))["files"])


def _clear(partial: Path) -> None:
    """Delete what a run keeps to go on from, and what one left that was killed as it wrote."""
    for left in (partial, *partial.parent.glob(f"{glob.escape(partial.name)}-*")):
        delete_folder(left)


def _question(options: StudyOptions) -> StudyQuestion:
    """The options that change the answer, checked."""
    from unibiomed_jax.inference.study_question import StudyQuestion
    from unibiomed_jax.outputs.study_folder import FORMATS

    for name in ("batch_size", "max_new_tokens", "max_masks", "parts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    for name in options.formats:
        if name not in FORMATS:
            raise InputError(f"--formats {shown(name)} is none; choose of {', '.join(FORMATS)}.")
    window: Any = options.window[0] if len(options.window) == 1 else None
    if len(options.window) == 2:
        try:
            window = (float(options.window[0]), float(options.window[1]))
        except ValueError:
            window = None
    if options.window and window is None:
        raise InputError(
            f"--window {shown(' '.join(options.window))} is no window; give a name, or black and white "
            "as two numbers."
        )
    conditioning: Any = options.conditioning[0] if len(options.conditioning) == 1 else options.conditioning
    if conditioning not in ("auto", "first", "each"):
        if not all(number.isdecimal() and int(number) > 0 for number in options.conditioning):
            raise InputError(
                f"--conditioning {shown(' '.join(options.conditioning))} is impossible; give auto, first, "
                "each or numbers of slices from 1."
            )
        conditioning = tuple(int(number) - 1 for number in options.conditioning)
        if len(set(conditioning)) < len(conditioning):
            raise InputError(
                f"--conditioning {' '.join(options.conditioning)} names a slice twice; name each once."
            )
    return StudyQuestion(
        conditioning=conditioning,
        window=window,
        parts=options.parts,
        smallest_ml=options.smallest_ml,
        hide_absent=options.hide_absent,
        max_new_tokens=options.max_new_tokens,
        max_masks=options.max_masks,
    )


def _needed(value: Any, option: str) -> Any:
    if value is None:
        raise InputError(f"--ask needs {option}; add it.")
    return value


def _folders(out: Path, chosen: list[Series]) -> list[Path]:
    """Where the answer about each series goes.

    Raises:
        InputError: something else lies there, or nothing can be written there.
    """
    from unibiomed_jax.outputs.study_folder import ANSWER

    many = len(chosen) > 1
    folders = [out / series.alias.replace("/", "-") if many else out for series in chosen]
    for folder in folders:
        if folder.exists() and not (folder / ANSWER).is_file():
            raise InputError(f"{shown(folder)} holds something else than an answer; choose another --out.")
    if many and (out / ANSWER).exists():
        raise InputError(f"{shown(out)} is the answer about one series; choose another --out for several.")
    if all((folder / ANSWER).is_file() for folder in folders):  # perhaps there is nothing to write
        return folders
    place = folders[0].parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"Nothing can be written into {shown(place)} ({error.strerror}); change its permissions or "
            "choose another --out."
        ) from None
    return folders


def _is_done(folder: Path, wanted: dict, formats: tuple[str, ...], opened: Study, deidentify: bool) -> bool:
    """Whether the answer to this request lies there whole, in these formats, of this very patient."""
    from unibiomed_jax.outputs.dicom_objects import belongs_to
    from unibiomed_jax.outputs.study_folder import ANSWER

    try:
        found = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
        if any(found[name] != value for name, value in wanted.items()):
            return False
        files = [folder / name for names in found["files"].values() for name in names]
        return (
            set(found["files"]) == set(formats)
            and all(file.is_file() for file in files)
            # Pixels alone do not say whose they are: identity may have been corrected since.
            and (deidentify or all(belongs_to(file, opened) for file in files if file.suffix == ".dcm"))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _usual_formats(opened: Study) -> tuple[str, ...]:
    """What can be written of every mask of such a study; says why what one expects is left out."""
    from unibiomed_jax.outputs.study_folder import require_formats
    from unibiomed_jax.studies.study import DicomSource

    expected = []
    if opened.geometry is not None:
        if not len(opened.geometry.uneven):
            expected.append("nifti")
        if isinstance(opened.source, DicomSource):
            expected.append("seg")
    formats = []
    for name in expected:
        try:
            require_formats(opened, (name,))
            formats.append(name)
        except DiskFullError:
            raise
        except InputError as error:
            _say(f"Left out: {error}")
    return (*formats, "html")


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A bar with the time left, to be told what is being done."""
    bar = progress_bar(console)
    tasks: dict[str, Any] = {}
    with bar:

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{name}: {stage}", total=total)
            bar.update(tasks[stage], completed=done)

        yield tell


def _show(opened: Study, answer: StudyAnswer, files: dict[str, list[str]]) -> None:
    """The answer in a few lines; `files` by format."""
    from unibiomed_jax.inference.phrases import clean_answer

    _say(f"{opened.series_alias}: {clean_answer(answer.text)}")
    for name, segment in zip(answer.names, answer.segments, strict=True):
        size = segment.measures
        if size.slices is None:
            _say(f"    {name}: nothing marked")
            continue
        parts = [
            *([f"{size.volume_ml:.2f} ml"] if size.volume_ml is not None else [f"{size.pixels} pixels"]),
            *([f"longest {size.diameter_mm:.1f} mm"] if size.diameter_mm is not None else []),
            _slices(*size.slices, of=len(opened.values)),
        ]
        _say(f"    {name}: {', '.join(parts)}")
    shown_slices = answer.conditioning.slices
    plane = "" if opened.geometry is None else f", {opened.geometry.plane} slices"
    window = "in colour" if answer.window is None else f"window {answer.window}"
    _say(f"    Shown: {window}{plane}, as the preset {answer.preprocessing.name!r} says.")
    if answer.conditioning.choice == "each":
        _say(f"    Slices: {answer.conditioning.reason}.")
    else:
        numbers = ", ".join(str(index + 1) for index in shown_slices)
        _say(f"    The language model saw slices {numbers}: {answer.conditioning.reason}.")
    for sentence in (*answer.cleaning, *answer.notes, *opened.notes):
        _say(f"    Note: {sentence}.")
    _say(f"    Written: {', '.join(name for name, names in files.items() if names)}.")
    if not all(files.values()):
        missing = ", ".join(name for name, names in files.items() if not names)
        _say(f"    Not written, for nothing is marked: {missing}.")


def _slices(first: int, last: int, *, of: int) -> str:
    return f"slice {first} of {of}" if first == last else f"slices {first} to {last} of {of}"


def _peak() -> float:
    """Most memory that this process has had, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _say(sentence: str) -> None:
    console.print(escape(sentence), highlight=False, soft_wrap=True)
