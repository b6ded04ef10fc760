"""`unibiomed predict`: ask every image the same question."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.errors import DiskFullError, InputError
from unibiomed_jax.inputs.images import IMAGE_SUFFIXES, by_number

console = Console()
errors = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Ask every image the same question; write text, masks and overlays."""

    # An image, or a folder of images (its subfolders included, but for a volume).
    image_or_folder: Annotated[Path, tyro.conf.Positional]
    # The question; write <image> where the image goes: "<image>Please segment the liver."
    prompt: str
    # A converted checkpoint directory, or a released one.
    checkpoint: Path
    # Where the answers go, a folder an image.
    out: Path
    # The folder is one volume: its images, sorted by name and number (2 before 10), are the slices.
    volume: bool = False
    # Slices that the language model sees (default: the first five).
    conditioning: tuple[int, ...] | None = None
    # Mask images of the regions that the question refers to (a single image only).
    region: tuple[Path, ...] = ()
    # Empty the masks of objects that the model itself thinks are absent (score not above 0).
    hide_absent: bool = False
    # Longest answer, tokens.
    max_new_tokens: int = 2048
    # Images answered in one go; takes the memory of the next power of two.
    batch_size: int = 1
    # "auto": bfloat16, as the reference; on a CPU the fastest policy that keeps the answers of float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Answer again what is already answered.
    overwrite: bool = False


def predict(options: PredictOptions) -> int:
    """Run `unibiomed predict`; FAILED_IN_PART if an image failed."""
    from unibiomed_jax.config.precision import BFLOAT16, FLOAT32
    from unibiomed_jax.inference.answer import INTENDED_USE
    from unibiomed_jax.inference.predictor import UniBiomed
    from unibiomed_jax.outputs import answer_folder

    sources = _sources(options)
    _check(options, sources)
    precision = {"auto": None, "float32": FLOAT32, "bfloat16": BFLOAT16}[options.precision]
    with console.status(f"Loading {escape(str(options.checkpoint))}"):
        model = UniBiomed.from_pretrained(options.checkpoint, precision=precision)

    todo = {
        name: source
        for name, source in sources.items()
        if options.overwrite
        or not answer_folder.is_done(
            options.out / name,
            prompt=options.prompt,
            checkpoint_hash=model.checkpoint_hash,
            request=_settings(options, source),
        )
    }
    if len(todo) < len(sources):
        console.print(f"{len(sources) - len(todo)} of {len(sources)} already answered in {options.out}.")
    reasons: dict[str, str | None] = {}  # why it failed, or None for what is done
    names = list(todo)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bar as progress:
        task = progress.add_task("Answering", total=len(names))
        try:
            for start in range(0, len(names), options.batch_size):
                group = names[start : start + options.batch_size]
                for name, reason in _answer(model, options, {name: todo[name] for name in group}):
                    reasons[name] = reason
                    progress.advance(task)
        except DiskFullError as error:
            reasons |= {name: str(error) for name in names if name not in reasons}

    failures = {name: reason for name, reason in reasons.items() if reason is not None}
    console.print(f"{len(names) - len(failures)} answered, {len(failures)} failed; results in {options.out}")
    for name, reason in failures.items():
        errors.print(f"[red]{escape(name)}[/red]: {escape(reason)}", highlight=False, soft_wrap=True)
    console.print(INTENDED_USE, style="italic")
    return FAILED_IN_PART if failures else DONE


def _answer(model, options: PredictOptions, group: dict[str, list[Path]]) -> Iterator[tuple[str, str | None]]:
    """Answer a group of images in one call and write the results; of each, why it failed, or None.

    Raises:
        DiskFullError: the answer of the next image and of all after it cannot be written.
    """
    from unibiomed_jax.inference.answer import Request
    from unibiomed_jax.inputs.images import open_mask
    from unibiomed_jax.outputs import answer_folder

    requests: dict[str, Request] = {}
    for name, paths in group.items():
        try:
            if options.volume:
                image = model.open_volume(paths, conditioning=options.conditioning)
            else:
                image = model.open(paths[0])
            request = Request(options.prompt, image, [open_mask(path) for path in options.region])
            model.prompt_of(request)  # a request that does not fit fails alone, not with its group
            requests[name] = request
        except InputError as error:
            yield name, str(error)
    try:
        answers = model.predict_batch(
            list(requests.values()), max_new_tokens=options.max_new_tokens, hide_absent=options.hide_absent
        )
    except (RuntimeError, MemoryError) as error:  # such as too little memory for these images
        reason = f"not answered: {error or type(error).__name__}; try a smaller --batch-size"
        yield from ((name, reason) for name in requests)
        return
    for (name, request), answer in zip(requests.items(), answers, strict=True):
        record = answer_folder.record(
            answer,
            checkpoint_hash=model.checkpoint_hash,
            precision=model.precision,
            request=_settings(options, group[name]),
        )
        try:
            answer_folder.write(options.out / name, request.image, answer, record)
        except DiskFullError:
            raise
        except InputError as error:
            yield name, str(error)
        else:
            yield name, None


def _check(options: PredictOptions, sources: dict[str, list[Path]]) -> None:
    """Refuse options that do not go together, before the model is loaded."""
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1.")
    if options.region and len(sources) > 1:
        raise InputError(
            f"--region belongs to one image, but {options.image_or_folder} holds {len(sources)}; name one."
        )
    if options.conditioning is not None and not options.volume:
        raise InputError("--conditioning chooses slices of a volume; add --volume, or leave it out.")


def _settings(options: PredictOptions, paths: list[Path]) -> dict:
    """What else an answer depends on: it is kept with the answer, and another one is asked for anew."""
    digest = hashlib.sha256()
    for path in (*paths, *options.region):
        with contextlib.suppress(OSError):  # a file that cannot be read is named when it is opened
            digest.update(path.read_bytes())
    return {
        "volume": options.volume,
        "conditioning": None if options.conditioning is None else list(options.conditioning),
        "regions": [str(path) for path in options.region],
        "hide_absent": options.hide_absent,
        "max_new_tokens": options.max_new_tokens,
        "precision": options.precision,
        "sha256": digest.hexdigest(),
    }


def _sources(options: PredictOptions) -> dict[str, list[Path]]:
    """Name of the answer's folder -> the image, or all slices of the volume."""
    path = options.image_or_folder
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")
    if path.is_file():
        if options.volume:
            raise InputError(f"{path} is a file; --volume needs a folder of slices.")
        return {path.name: [path]}
    answers = options.out.resolve()  # not to be asked about, should they lie inside the folder
    found = sorted(
        (
            p
            for p in (path.iterdir() if options.volume else path.rglob("*"))
            if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and answers not in p.resolve().parents
        ),
        key=by_number,
    )
    if not found:
        raise InputError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); check the folder.")
    if options.volume:
        return {path.resolve().name: found}
    return {str(p.relative_to(path)): [p] for p in found}
