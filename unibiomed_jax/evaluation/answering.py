"""Ask a model every record of an evaluation, several at a time, and keep each answer as it comes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from unibiomed_jax import distributed
from unibiomed_jax.data.transforms import draw_box
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.records import (
    Sample,
    SampleWriter,
    decode_masks,
    encode_masks,
    read_samples,
    samples_file,
    write_samples,
)
from unibiomed_jax.evaluation.tasks import TASKS
from unibiomed_jax.files import find_file, locate, shown
from unibiomed_jax.inference.answer import Answer, OpenedImage, Request
from unibiomed_jax.inference.buckets import tile_bucket, token_bucket
from unibiomed_jax.inference.predictor import UniBiomed
from unibiomed_jax.inputs.images import open_image

# Masks that an answer has room for where all of it is one compiled call; one with more is asked by itself.
OBJECTS = 4
# At a time: the words of one, the images of two, the masks of another one (see `UniBiomed.predict_batch`).
STAGES = 4
_MARKS = re.compile(r"<\|\w+\|>|</?p>|\[SEG\]")


class Asker:
    """Questions on their way to a model: those of one shape are answered together, and a few such groups at
    a time, each in another stage of its answer (see `UniBiomed.predict_batch`).

    Every image is opened and encoded once for all questions about it.
    """

    def __init__(
        self,
        model: UniBiomed,
        data: Path,
        *,
        batch_size: int,
        max_new_tokens: int,
        grounded: bool = False,
        conditioning: Literal["first", "target"] = "target",
    ):
        """`data` is the folder that images' names start from; `grounded` asks by `UniBiomed.ground`;
        `conditioning` says which slices of a volume the language model sees.
        """
        self.conditioning = conditioning
        self.model, self.data = model, locate(data)
        self.batch_size, self.max_new_tokens, self.grounded = batch_size, max_new_tokens, grounded
        # The last image that was opened, and its name.
        self._last: tuple[str, OpenedImage] | None = None

    def ask(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """The records with their answers, or with the reason why they have none, as they come."""
        # Calls on several devices must not meet each other there.
        lanes = 1 if self.model.layout.mesh.size > 1 else STAGES
        running: set[Future[list[Sample]]] = set()
        pool = ThreadPoolExecutor(lanes)
        try:
            for group in self._groups(samples):
                if isinstance(group, Sample):
                    yield group
                    continue
                running.add(pool.submit(self._answer, group))
                if len(running) == lanes:
                    yield from _first(running)
            while running:
                yield from _first(running)
        except GeneratorExit:
            raise
        except BaseException:  # an interruption: what is on its way ends first, and nothing of it is lost
            while running:
                yield from _first(running)
            raise
        finally:
            pool.shutdown(wait=False)

    def _groups(self, samples: Sequence[Sample]) -> Iterator[list[_Asked] | Sample]:
        """What is asked together, and the records that cannot be asked."""
        place = {name: number for number, name in enumerate(dict.fromkeys(s.image for s in samples))}
        waiting: dict[_Shape, list[_Asked]] = {}
        for sample in sorted(samples, key=lambda sample: place[sample.image]):
            if sample.reason is not None:
                yield sample
                continue
            try:
                asked = _Asked(sample, self._request(sample))
                tokens = len(self.model.prompt_of(asked.request).ids)
            except InputError as error:
                yield replace(sample, reason=str(error))
                continue
            shape = _shape(asked, tokens)
            group = waiting.setdefault(shape, [])
            group.append(asked)
            if len(group) == self._together(shape):
                yield waiting.pop(shape)
        # What is left over of several tasks and lengths is answered together: fewer calls and new shapes.
        rest: dict[_Shape, list[_Asked]] = {}
        for shape in sorted(waiting, key=lambda shape: shape.tokens):
            rest.setdefault(shape._replace(task="", tokens=0), []).extend(waiting[shape])
        for shape, group in rest.items():
            for start in range(0, len(group), self._together(shape)):
                yield group[start : start + self._together(shape)]

    def _together(self, shape: _Shape) -> int:
        """How many are asked at a time: every volume by itself, unless they are spread over devices."""
        shares = self.model.layout.batch_shares
        if shape.frames:
            return shares if self.grounded else 1
        return -(-self.batch_size // shares) * shares

    def _request(self, sample: Sample) -> Request:
        if sample.slices:
            return Request(sample.question, self._open_volume(sample))
        if sample.task == "region" and sample.truth_masks:
            (region,) = decode_masks(sample.truth_masks[:1], sample.doc_id)
            pixels = np.asarray(open_image(self.data / sample.image)[0])
            if region.shape != pixels.shape[:2]:
                (height, width), (tall, wide) = region.shape, pixels.shape[:2]
                raise InputError(
                    f"{shown(sample.doc_id)} is a mask of {width}x{height} pixels, its image "
                    f"{shown(sample.image)} has {wide}x{tall}; correct one of them."
                )
            boxed = Image.fromarray(draw_box(pixels, region, np.random.default_rng(0)))
            return Request(sample.question, self.model.open(boxed))
        if self._last is None or self._last[0] != sample.image:
            self._last = sample.image, self.model.open(self.data / sample.image)
        return Request(sample.question, self._last[1])

    def _open_volume(self, sample: Sample) -> OpenedImage:
        """A volume, with its first slices or some that show the target for the language model to see."""
        paths = [locate(find_file(self.data / sample.image / name)) for name in sample.slices]
        most = self.model.config.sam2.max_conditioning_frames
        if self.conditioning == "first":
            return self.model.open_volume(paths, conditioning=range(min(most, len(paths))))
        truths = decode_masks(sample.truth_masks[:1], sample.doc_id)
        shown_in = np.flatnonzero(truths[0].any((1, 2))) if truths else ()
        if not len(shown_in):  # nowhere, or nobody knows
            shown_in = np.arange(len(sample.slices))
        limit = min(most, len(shown_in))
        chosen = shown_in[np.linspace(0, len(shown_in) - 1, limit + 2).round().astype(int)[1:-1]]
        return self.model.open_volume(paths, conditioning=sorted(set(chosen.tolist())))

    def _answer(self, group: Sequence[_Asked]) -> list[Sample]:
        requests = [asked.request for asked in group]
        try:
            answers = self._said(requests)
        except (RuntimeError, MemoryError) as error:  # such as too little memory for these images
            reason = f"not answered: {error or type(error).__name__}; try a smaller --batch-size"
            return [replace(asked.sample, reason=reason) for asked in group]
        return [_with_answer(asked.sample, answer) for asked, answer in zip(group, answers, strict=True)]

    def _said(self, requests: Sequence[Request]) -> list[Answer]:
        if self.grounded:
            try:
                return self.model.ground(requests, max_new_tokens=self.max_new_tokens, objects=OBJECTS)
            except InputError:  # more masks than there is room for
                pass
        return self.model.predict_batch(requests, max_new_tokens=self.max_new_tokens)


def _first(running: set[Future[list[Sample]]]) -> Iterator[Sample]:
    """The answers of a group that is done, which is no longer running then."""
    future = next(as_completed(running))
    running.remove(future)
    yield from future.result()


class _Asked(NamedTuple):
    sample: Sample
    request: Request


class _Shape(NamedTuple):
    """Requests of one shape are asked in one call."""

    # Its answers are about equally long; a call takes as long as the longest.
    task: str
    frames: int
    tiles: int
    tokens: int


def _shape(asked: _Asked, tokens: int) -> _Shape:
    image = asked.request.image
    assert isinstance(image, OpenedImage)
    frames = len(image.frames) if image.is_volume else 0
    return _Shape(asked.sample.task, frames, tile_bucket(len(image.tiles)), token_bucket(tokens))


def _with_answer(sample: Sample, answer: Answer) -> Sample:
    """The record with what was said: the words without marks, and masks if the task has some."""
    segments = answer.segments if TASKS[sample.task].masks else ()
    return replace(
        sample,
        response=answer.text,
        prediction=" ".join(_MARKS.sub(" ", answer.text).split()),
        masks=encode_masks(segment.mask for segment in segments),
        object_scores=tuple(float(np.max(segment.object_score)) for segment in segments),
    )


# --------------------------------------------------------------------------------------- files of a run


def resume(run: Path, samples: Sequence[Sample]) -> dict[str, set[str]]:
    """The doc_ids, by task, that are answered in a run's folder; what failed, or was asked otherwise, goes.

    Called by the first process alone. Answers of several processes that were killed are taken over.
    """
    done: dict[str, set[str]] = {}
    for task, of_task in by_task(samples).items():
        now = {sample.doc_id: sample for sample in of_task}
        kept: dict[str, Sample] = {}
        parts = sorted(run.glob(f"{samples_file(run, task).name}.part*"))
        for path in (samples_file(run, task), *parts):
            if path.exists() and path.stat().st_size:
                for sample in _answered(path, task):
                    if sample.reason is None and _same(sample, now.get(sample.doc_id)):
                        kept[sample.doc_id] = sample
        if kept or samples_file(run, task).exists():
            write_samples(samples_file(run, task), kept.values())
        for path in parts:
            path.unlink()
        done[task] = set(kept)
    return done


def _same(answered: Sample, now: Sample | None) -> bool:
    """Whether the record is still asked so; a truth that cannot be read at the moment is no other truth."""
    if now is not None and now.reason is not None:
        answered = replace(answered, truth_masks=now.truth_masks)
    return now is not None and answered.key == now.key


def _answered(path: Path, task: str) -> list[Sample]:
    """The records of a file that may hold nothing but the beginning of one."""
    return read_samples(path, task) if b"\n" in path.read_bytes() else []


def by_task(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.task, []).append(sample)
    return found


def answer_all(asker: Asker, run: Path, samples: Sequence[Sample]) -> Iterator[Sample]:
    """Ask this process's share, and write each answer down as it comes.

    The first process appends to the files of the run, the others to files beside them (see `merge`).
    """
    part = "" if distributed.is_first() else f".part{distributed.process()}"
    writers: dict[str, SampleWriter] = {}
    try:
        for sample in asker.ask(samples):
            if sample.task not in writers:
                path = samples_file(run, sample.task)
                writers[sample.task] = SampleWriter(path.with_name(path.name + part))
            writers[sample.task].write(sample)
            yield sample
    finally:
        for writer in writers.values():
            writer.close()


def merge(run: Path, samples: Sequence[Sample]) -> Mapping[str, list[Sample]]:
    """All answers of all processes, in the order of the records; by the first process, when all are done.

    Raises:
        InputError: answers of a process are missing.
    """
    merged = {}
    for task, of_task in by_task(samples).items():
        path = samples_file(run, task)
        parts = sorted(run.glob(f"{path.name}.part*"))
        found = {
            sample.doc_id: sample
            for file in (path, *parts)
            if file.exists()
            for sample in _answered(file, task)
        }
        missing = [sample.doc_id for sample in of_task if sample.doc_id not in found]
        if missing:
            raise InputError(
                f"{shown(run)} lacks answers such as {shown(missing[0])}; give all processes one folder that "
                "they share, and start them again."
            )
        merged[task] = [found[sample.doc_id] for sample in of_task]
        write_samples(path, merged[task])
        for file in parts:
            file.unlink()
    return merged
