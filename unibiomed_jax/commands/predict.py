"""`unibiomed predict`: ask every image the same question."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from PIL import Image
from rich.console import Console
from rich.markup import escape

from unibiomed_jax import distributed
from unibiomed_jax.commands.model import load_model
from unibiomed_jax.commands.progress import progress_bar
from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.config.fields import Address
from unibiomed_jax.config.precision import PrecisionName
from unibiomed_jax.distributed import Processes
from unibiomed_jax.errors import DiskFullError, InputError
from unibiomed_jax.files import in_bucket, shown
from unibiomed_jax.inputs.formats import VOLUME_SUFFIXES, scan_refusal
from unibiomed_jax.inputs.images import by_number
from unibiomed_jax.studies.dicom_files import is_dicom

if TYPE_CHECKING:
    from unibiomed_jax.inference.answer import Sampling

console = Console()
errors = Console(stderr=True)
# Formats of which files are taken from a folder; a file that is named is read whatever it is called.
FORMATS = "AVIF BMP DIB GIF JPEG JPEG2000 MPO PCX PNG PPM SGI TGA TIFF WEBP".split()
# Names of what was left out that are printed; all are counted.
NAMED = 20


@dataclasses.dataclass(frozen=True)
class PredictOptions(Processes):
    """Ask every image the same question; write text, masks and overlays."""

    # An image, or a folder of images (its subfolders included, but for a volume).
    image_or_folder: Annotated[Address, tyro.conf.Positional]
    # The question; write <image> where the image goes: "<image>Please segment the liver."
    prompt: str
    # A converted or a released folder, or a repository on Hugging Face.
    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")]
    # Where the answers go, a folder per image.
    out: Address
    # The folder is one volume: its images, sorted by name and number (2 before 10), are the slices.
    volume: bool = False
    # Slices that the language model sees (default: the first five, or as many as the checkpoint takes).
    conditioning: tuple[int, ...] | None = None
    # Mask images of the regions that the question refers to (a single image only).
    region: tuple[Address, ...] = ()
    # Empty the masks of objects that the model itself thinks are absent (score not above 0).
    hide_absent: bool = False
    # Longest answer, tokens.
    max_new_tokens: int = 2048
    # Stop an answer with this many masks.
    max_masks: int | None = None
    # Draw the words at this temperature instead of taking the likeliest.
    temperature: float | None = None
    # With a temperature: draw only from the likeliest words that have this much probability together.
    top_p: float = 1.0
    # With a temperature: another seed, another answer.
    seed: int = 0
    # Show the words as they are said (a single image or volume).
    stream: bool = False
    # Images answered in one go; takes the memory of the next power of two.
    batch_size: int = 1
    # "auto": bfloat16, as the reference; float32 on a CPU. "fast": coarser, where a CPU multiplies bfloat16.
    precision: PrecisionName = "auto"
    # Divide the model over all devices of a process: a strategy of unibiomed_jax/sharding/strategies.py.
    strategy: str | None = None
    # With a strategy: devices along the axes of the mesh, such as fsdp=4,tensor=2.
    mesh: str | None = None
    # Answer again what is already answered.
    overwrite: bool = False


def predict(options: PredictOptions) -> int:
    """Run `unibiomed predict`; FAILED_IN_PART if an image failed.

    Every process of a job has the model on devices of its own and answers its share of the images.
    """
    from unibiomed_jax.inference.answer import INTENDED_USE

    distributed.join(options)
    console.quiet = errors.quiet = not distributed.is_first()
    sources, left_out = _sources(options)
    _check(options, sources)
    _require_same(options, sources)
    model = load_model(
        options.checkpoint,
        console,
        precision=options.precision,
        strategy=options.strategy,
        mesh=options.mesh,
    )

    own = distributed.share(list(sources))
    todo = [name for name in own if options.overwrite or not _is_done(model, options, name, sources)]
    done = sum(distributed.gather(len(own) - len(todo)))
    if done:
        _say(f"{done} of {len(sources)} already answered in {shown(options.out)}.")
    reasons: dict[str, str | None] = {}  # why it failed, or None for what is done
    bar = progress_bar(console)
    with contextlib.nullcontext() if options.stream else bar:
        task = bar.add_task("Answering", total=len(todo))
        try:
            for start in range(0, len(todo), options.batch_size):
                group = {name: sources[name] for name in todo[start : start + options.batch_size]}
                for name, reason in _answer(model, options, group):
                    reasons[name] = reason
                    bar.advance(task)
        except DiskFullError as error:
            reasons |= {name: str(error) for name in todo if name not in reasons}
        except KeyboardInterrupt:
            done = sum(reason is None for reason in reasons.values())
            raise KeyboardInterrupt(
                f"Stopped; {done} of {len(todo)} answered, the same command goes on."
            ) from None

    answered = sum(distributed.gather(sum(reason is None for reason in reasons.values())))
    failed = {name: reason for name, reason in reasons.items() if reason is not None}
    reasons = {name: reason for part in distributed.gather(failed) for name, reason in part.items()}
    failures = {name: reasons[name] for name in sources if name in reasons}
    _say(f"{answered} answered, {len(failures)} failed; results in {shown(options.out)}")
    for name, reason in failures.items():
        errors.print(f"[red]{escape(shown(name))}[/red]: {escape(reason)}", highlight=False, soft_wrap=True)
    scans = sum(_is_scan(path) for path in left_out)
    if left_out:
        names = ", ".join(shown(path.name) for path in left_out[:NAMED])
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        _say(f"Left out, {len(left_out)} that this command does not read as images: {names}{more}.")
    if scans:
        errors.print(
            f"{scans} of them are DICOM or volumes; ask about them with `unibiomed study`.", soft_wrap=True
        )
    console.print(INTENDED_USE, style="italic")
    return FAILED_IN_PART if failures or scans else DONE


def _require_same(options: PredictOptions, sources: dict[str, list[Path]]) -> None:
    """Refuse processes that ask something else, or see other images: their shares would not fit."""
    asked = dataclasses.asdict(options)
    del asked["process"]
    names = hashlib.sha256(os.fsencode("\n".join(sources))).hexdigest()[:12]
    distributed.require_equal("program", distributed.code_version())
    distributed.require_equal("question", asked)
    distributed.require_equal("folder of images", {"number": len(sources), "hash of names": names})


def _answer(model, options: PredictOptions, group: dict[str, list[Path]]) -> Iterator[tuple[str, str | None]]:
    """Answer a group of images in one call and write the results; of each, why it failed, or None.

    Raises:
        DiskFullError: the answer of the next image and of all after it cannot be written.
    """
    from unibiomed_jax.inference.answer import Request
    from unibiomed_jax.inputs.masks import open_mask
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
        answers = _said(model, options, list(requests.values()))
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


def _said(model, options: PredictOptions, requests: list) -> list:
    """The answers to requests; the words of a single one are shown as they come, if that is asked for."""
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "max_masks": options.max_masks,
        "sampling": _sampling(options),
        "hide_absent": options.hide_absent,
    }
    if not options.stream or not requests:
        return model.predict_batch(requests, **settings)
    (request,) = requests
    answer = None
    for piece in model.stream(request.image, request.prompt, regions=request.regions, **settings):
        if isinstance(piece, str):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        else:
            answer = piece
    console.print()
    return [answer]


def _check(options: PredictOptions, sources: dict[str, list[Path]]) -> None:
    """Refuse options that do not go together, before the model is loaded."""
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"--prompt {shown(options.prompt)!r} is no valid text; type it in a terminal that uses UTF-8."
        ) from None
    for name in ("batch_size", "max_new_tokens", "max_masks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if options.region and len(sources) > 1:
        raise InputError(
            f"--region belongs to one image, but {shown(options.image_or_folder)} holds {len(sources)}; name "
            "one."
        )
    if options.stream and len(sources) > 1:
        raise InputError(
            f"--stream shows one answer, but {shown(options.image_or_folder)} holds {len(sources)} images; "
            "name one."
        )
    if options.conditioning is not None and not options.volume:
        raise InputError("--conditioning chooses slices of a volume; add --volume, or leave it out.")
    if options.temperature is None and (options.top_p != 1.0 or options.seed):
        raise InputError("--top-p and --seed belong to words that are drawn; add --temperature.")
    if options.mesh is not None and options.strategy is None:
        raise InputError(f"--mesh {options.mesh} spreads a strategy over devices; add --strategy.")
    _sampling(options)
    if options.out.resolve() == options.image_or_folder.resolve():
        raise InputError(
            f"--out {shown(options.out)} is where the images lie; give the answers another folder."
        )


def _sampling(options: PredictOptions) -> Sampling | None:
    from unibiomed_jax.inference.answer import Sampling  # with JAX, as above

    if options.temperature is None:
        return None
    return Sampling(options.temperature, options.top_p, options.seed)


def _is_done(model, options: PredictOptions, name: str, sources: dict[str, list[Path]]) -> bool:
    """Whether the answer lies there; only then the image is read, to see whether it is the same."""
    from unibiomed_jax.outputs import answer_folder

    folder = options.out / name
    return answer_folder.exists(folder) and answer_folder.is_done(
        folder,
        prompt=options.prompt,
        checkpoint_hash=model.checkpoint_hash,
        request=_settings(options, sources[name]),
    )


def _settings(options: PredictOptions, paths: list[Path]) -> dict:
    """Everything else the answer depends on; stored with it, and asked again when it differs."""
    digest = hashlib.sha256()
    for path in (*paths, *options.region):
        with contextlib.suppress(OSError):  # a file that cannot be read is named when it is opened
            digest.update(path.read_bytes())
    drawn = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    return {
        "volume": options.volume,
        "conditioning": None if options.conditioning is None else list(options.conditioning),
        "regions": [shown(path.name) for path in options.region],
        "hide_absent": options.hide_absent,
        "max_new_tokens": options.max_new_tokens,
        "precision": options.precision,
        "sha256": digest.hexdigest(),
        **({} if options.max_masks is None else {"max_masks": options.max_masks}),
        **({} if options.temperature is None else drawn),
    }


def _sources(options: PredictOptions) -> tuple[dict[str, list[Path]], list[Path]]:
    """Name of the answer's folder -> the image, or all slices of the volume; and what else lies there.

    Hidden files and folders (.DS_Store, ._0.png) are passed over.
    """
    path = options.image_or_folder
    if not path.exists():
        raise InputError(f"{shown(path)} does not exist; check the path.")
    if path.is_file():
        if options.volume:
            raise InputError(f"{shown(path)} is a file; --volume needs a folder of slices.")
        if _is_scan(path):
            raise scan_refusal(shown(path))
        return {path.name: [path]}, []
    suffixes = image_suffixes()
    images, left_out = [], []
    files = _files_of_bucket if in_bucket(path) else _files
    for found in files(path, options.out.resolve(), deep=not options.volume):
        (images if found.suffix.lower() in suffixes else left_out).append(found)
    images.sort(key=by_number)
    if not images and any(map(_is_scan, left_out)):
        raise scan_refusal(f"What {shown(path)} holds")
    if not images:
        raise InputError(f"{shown(path)} holds no image ({', '.join(sorted(suffixes))}); check the folder.")
    if options.volume:
        return {path.resolve().name: images}, left_out
    return {str(found.relative_to(path)): [found] for found in images}, left_out


def _is_scan(path: Path) -> bool:
    """Whether a file is DICOM or a volume, which `unibiomed study` reads."""
    try:
        return path.is_file() and (path.name.lower().endswith(VOLUME_SUFFIXES) or is_dicom(path))
    except OSError:
        return False


def image_suffixes() -> set[str]:
    """The endings that Pillow gives to files of these formats."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def _files(folder: Path, answers: Path, *, deep: bool) -> Iterator[Path]:
    """The files of a folder that are not hidden, and folders that are links, which are not followed.

    Answers, of this run or of another, are no images, should they lie inside.

    Raises:
        InputError: a folder cannot be read.
    """
    from unibiomed_jax.outputs.answer_folder import ANSWER_FILE

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{shown(error.filename)} cannot be read ({error.strerror}); change its permissions."
        )

    for place, folders, files in os.walk(folder, onerror=refuse):
        inside = Path(place)
        if ANSWER_FILE in files:
            folders.clear()
            yield inside / ANSWER_FILE
            continue
        if deep:
            yield from (inside / name for name in sorted(folders) if (inside / name).is_symlink())
        folders[:] = sorted(
            name
            for name in folders
            if deep and not name.startswith(".") and (inside / name).resolve() != answers
        )
        yield from (inside / name for name in sorted(files) if not name.startswith("."))


def _files_of_bucket(folder: Path, answers: Path, *, deep: bool) -> Iterator[Path]:
    """As `_files`."""
    from unibiomed_jax.outputs.answer_folder import ANSWER_FILE

    files = [folder / name for name in folder.walk_files()]
    answered = {path.parent for path in files if path.name == ANSWER_FILE}
    for path in files:
        inside = path.relative_to(folder)
        above = [parent for parent in path.parents if parent == folder or parent.is_relative_to(folder)]
        of_answer = answered & set(above)
        if of_answer:
            if path.name == ANSWER_FILE and len(of_answer) == 1:
                yield path
        elif (deep or len(inside.parts) == 1) and answers not in above:
            if not any(part.startswith(".") for part in inside.parts):
                yield path


def _say(sentence: str) -> None:
    console.print(escape(sentence), highlight=False, soft_wrap=True)
