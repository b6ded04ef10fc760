"""Ask an image a question: `UniBiomed.from_pretrained(path).predict(image, prompt)`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Float32

from unibiomed_jax import runtime
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import Precision, find_precision
from unibiomed_jax.conversion import loading
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.answer import (
    Answer,
    OpenedImage,
    OpenedRequest,
    Prompt,
    Request,
    Sampling,
    Segment,
)
from unibiomed_jax.inference.batching import (
    frame_arrays,
    prompt_arrays,
    prompt_of,
    tile_arrays,
    volume_arrays,
)
from unibiomed_jax.inference.buckets import chunks, power_of_two, tile_chunks
from unibiomed_jax.inference.generate import Decoding, Draw, Limits
from unibiomed_jax.inference.network import build_network
from unibiomed_jax.inference.phrases import parse_answer
from unibiomed_jax.inference.segments import full_size
from unibiomed_jax.inference.stages import StageIds, Stages
from unibiomed_jax.inference.stopping import end_of, stop_text
from unibiomed_jax.inference.study_answer import StudyAnswer
from unibiomed_jax.inference.study_asking import ask_study
from unibiomed_jax.inference.study_question import Conditions, StudyQuestion
from unibiomed_jax.inference.study_run import Progress
from unibiomed_jax.inputs.images import ImageRecord, ImageSource, open_frames, open_image
from unibiomed_jax.inputs.tiles import frame_tiles, image_tiles, sam_image
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.models.sam2 import plan_frames
from unibiomed_jax.sharding.axes import axis_units
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.studies.study import Study

# Tokens between two looks of the host at the text. The loop also stops by itself where the text may end.
TOKENS_PER_LOOK = 64
# The same where the words are shown as they come.
TOKENS_PER_PIECE = 8


@dataclasses.dataclass
class _Answering:
    """Answers that are being said."""

    requests: list[OpenedRequest]
    prompts: list[Prompt]
    limits: Limits
    state: Decoding
    # By stage.
    seconds: dict[str, float]
    # Token ids of every answer so far, cut where it ends.
    said: list[list[int]] = dataclasses.field(default_factory=list)


class UniBiomed:
    """The model with its tokenizer, ready to answer.

    Every size is rounded up to one of a few (`buckets`), and a process compiles nothing for those it has met.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        tokenizer: Tokenizer,
        *,
        precision: Precision | None = None,
        checkpoint_hash: str = "",
        layout: Layout | None = None,
    ):
        """`layout` divides the model over devices; `params`, the parameter tree of `UniBiomedModel(config)`,
        is emptied, so that no weight is held in two number formats.
        """
        layout = layout or Layout.over(jax.local_devices()[:1])
        runtime.prepare(layout.platform)
        self.config = config
        self.precision = precision or find_precision("auto", layout.platform)
        self.tokenizer = tokenizer
        self.checkpoint_hash = checkpoint_hash
        self.layout = layout = dataclasses.replace(layout, units=axis_units(config))
        self.graphdef, self.params = build_network(config, params, self.precision, layout)
        # Batches of several threads follow each other through the stages of an answer: two may encode images,
        # as one leaves a core half idle. On several devices one works at all: they talk to each other.
        self._wording, self._decoding = threading.Lock(), threading.Lock()
        self._encoding: threading.Semaphore | threading.Lock = threading.Semaphore(2)
        if layout.mesh.size > 1:
            self._encoding = self._decoding = self._wording
        self._stop_text = functools.cache(lambda: stop_text(tokenizer, config.language.vocab_size))
        self.stages = Stages(self.graphdef, StageIds.of(tokenizer), layout)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, precision: Precision | None = None, layout: Layout | None = None
    ) -> UniBiomed:
        """Load a checkpoint.

        Args:
            path: a converted folder, a released one (which is converted in memory), or, as a text,
                `owner/name[@revision]` on the Hugging Face hub: what is downloaded and converted is kept for
                the next time.
            precision: of the arithmetic; by default what suits the device.
            layout: how the model is divided over devices; by default the first device has all of it.

        Raises:
            InputError: the folder or a file of it is missing, damaged or of another model, or the repository
                cannot be downloaded.
        """
        loaded = loading.load(path, sharding=layout and layout.parameter)
        return cls(
            loaded.config,
            loaded.params,
            Tokenizer.from_folder(loaded.tokenizer),
            precision=precision,
            checkpoint_hash=loaded.hash,
            layout=layout,
        )

    # ---------------------------------------------------------------------------------------- questions

    def open(self, image: ImageSource) -> OpenedImage:
        """Read an image, for several questions about it."""
        config, side = self.config, self.config.vision.image_size
        frame, record = open_image(image)
        tiles, (columns, rows) = image_tiles(
            frame,
            tile_size=side,
            min_tiles=config.min_tiles,
            max_tiles=config.max_tiles,
            use_thumbnail=config.use_thumbnail,
        )
        cut = f"stretched and cut into {columns}x{rows} tiles of {side}x{side} pixels for the words"
        whole = ", with the whole as one more" if len(tiles) > columns * rows else ""
        return OpenedImage([frame], [self._record_steps(record, cut + whole)], tiles)

    def open_volume(
        self, frames: Sequence[ImageSource], *, conditioning: Sequence[int] | None = None
    ) -> OpenedImage:
        """Read the slices of a volume, or the frames of a sequence, in order.

        `conditioning` are the indices of the frames that the language model sees (at most five) and that are
        segmented from its words; the others are segmented by following the objects from there. The reference
        always takes the first five, which misses what appears later: choose slices that show the target.
        """
        images, records = open_frames(frames)
        plan = plan_frames(len(images), self.config.sam2, conditioning)
        chosen = plan.index[(plan.direction == 0) & plan.valid].tolist()
        side = self.config.vision.image_size
        tiles = frame_tiles([images[i] for i in chosen], tile_size=side)
        shown = (f"stretched to {side}x{side} pixels for the words",)
        records = [
            self._record_steps(record, *(shown if index in chosen else ()))
            for index, record in enumerate(records)
        ]
        return OpenedImage(images, records, tiles, chosen)

    def _record_steps(self, record: ImageRecord, *steps: str) -> ImageRecord:
        """The record with `steps` and with what SAM2 does to every image."""
        size = self.config.sam2.image_size
        masks = f"stretched to {size}x{size} pixels for the masks"
        return dataclasses.replace(record, steps=(*record.steps, *steps, masks))

    def predict(
        self,
        image: ImageSource | OpenedImage | None,
        prompt: str,
        *,
        regions: Sequence[np.ndarray] = (),
        boxes: Sequence[Sequence[float]] = (),
        history: Answer | None = None,
        max_new_tokens: int = 2048,
        max_masks: int | None = None,
        sampling: Sampling | None = None,
        hide_absent: bool = False,
    ) -> Answer:
        """Answer one question; see `Request` for the arguments and `predict_batch` for the rest."""
        return self.predict_batch(
            [Request(prompt, image, regions, boxes, history)],
            max_new_tokens=max_new_tokens,
            max_masks=max_masks,
            sampling=sampling,
            hide_absent=hide_absent,
        )[0]

    def predict_batch(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 2048,
        max_masks: int | None = None,
        sampling: Sampling | None = None,
        hide_absent: bool = False,
    ) -> list[Answer]:
        """Answer several questions about different images in one go, with the answers of one by one.

        Threads may call it at the same time: while one waits for its masks, the next can have its words.

        Args:
            requests: the questions.
            max_new_tokens: longest answer in tokens, shortened where the model's context ends.
            max_masks: stop an answer with this many `[SEG]`, one token after the last of them.
            sampling: draw the tokens; by default the likeliest is taken, as the reference does.
            hide_absent: empty the masks (frame by frame) whose object score is not above 0. The reference
                never does, so that masks of things that are not there stay.

        Raises:
            InputError: a request that cannot be answered; none of the batch is.
        """
        if not requests:
            return []
        with self._wording:
            answering = self._start(requests, max_new_tokens, max_masks, sampling)
            for _ in self._looks(answering, TOKENS_PER_LOOK):
                pass
            # Not held while the batch waits for its masks.
            answering.state = answering.state._replace(cache=None)
        return self._finish(answering, hide_absent)

    def say(
        self,
        request: Request,
        *,
        max_new_tokens: int = 2048,
        max_masks: int | None = None,
    ) -> tuple[str, Float32[np.ndarray, "objects embed"]]:
        """The words of the answer to one question, and the language model's state at each `[SEG]`.

        Raises:
            InputError: a request that cannot be answered.
        """
        answering = self._start([request], max_new_tokens, max_masks, None)
        for _ in self._looks(answering, TOKENS_PER_LOOK):
            pass
        (ids,) = answering.said
        positions = self._seg_positions(ids)
        return self.tokenizer.decode(ids), np.asarray(answering.state.hidden[0], np.float32)[positions]

    def ask_study(
        self,
        study: Study,
        prompt: str,
        *,
        conditioning: Conditions = "auto",
        window: str | tuple[float, float] | None = None,
        parts: int | None = None,
        smallest_ml: float | None = None,
        hide_absent: bool = False,
        max_new_tokens: int = 256,
        max_masks: int | None = None,
        batch_size: int = 4,
        state: str | os.PathLike | None = None,
        progress: Progress | None = None,
    ) -> StudyAnswer:
        """Ask a study (see `open_study`) a question; see `study_asking.ask_study` for the arguments."""
        return ask_study(
            self,
            study,
            prompt,
            StudyQuestion(
                conditioning=conditioning,
                window=window,
                parts=parts,
                smallest_ml=smallest_ml,
                hide_absent=hide_absent,
                max_new_tokens=max_new_tokens,
                max_masks=max_masks,
            ),
            batch_size=batch_size,
            state=state,
            progress=progress,
        )

    def stream(
        self,
        image: ImageSource | OpenedImage | None,
        prompt: str,
        *,
        regions: Sequence[np.ndarray] = (),
        boxes: Sequence[Sequence[float]] = (),
        history: Answer | None = None,
        max_new_tokens: int = 2048,
        max_masks: int | None = None,
        sampling: Sampling | None = None,
        hide_absent: bool = False,
    ) -> Iterator[str | Answer]:
        """As `predict`, in pieces: the text as it is said, a few tokens at a time, and the answer at the end.

        The pieces joined are the text of the answer (but for white space around it).
        """
        request = Request(prompt, image, regions, boxes, history)
        answering = self._start([request], max_new_tokens, max_masks, sampling)
        shown = ""
        for (ids,) in self._looks(answering, TOKENS_PER_PIECE):
            text = self.tokenizer.decode(ids)
            if text.startswith(shown) and not text.endswith("\ufffd"):  # half a character, so far
                yield text[len(shown) :]
                shown = text
        (answer,) = self._finish(answering, hide_absent)
        rest = self.tokenizer.decode(answering.said[0])[len(shown) :]
        if rest:
            yield rest
        yield answer

    def ground(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int = 256,
        max_masks: int | None = None,
        sampling: Sampling | None = None,
        objects: int = 4,
        hide_absent: bool = False,
    ) -> list[Answer]:
        """Answer as `predict_batch` does, by one compiled call from pixels to masks (see `generate.ground`).

        It is what is divided over devices and exported. Every shape is fixed beforehand: all requests are
        about images, or all about volumes of one length, or all about words alone; nothing that was encoded
        for an earlier question is used.

        Args:
            requests: the questions.
            max_new_tokens: longest answer in tokens, shortened where the model's context ends.
            max_masks, sampling, hide_absent: as in `predict_batch`.
            objects: masks that an answer has room for.

        Raises:
            InputError: a request that cannot be answered, requests of several kinds, or an answer with more
                masks than `objects`.
        """
        if not requests:
            return []
        if objects < 1:
            raise InputError(f"objects is {objects}; an answer needs room for at least one mask.")
        seconds: dict[str, float] = defaultdict(float)
        with _timed(seconds, "read images"):
            opened = self._opened(requests)
            prompts = [self.prompt_of(request) for request in opened]
            frames, plan = frame_arrays(self.config.sam2, opened)
            ids, source, lengths, forced, limits = prompt_arrays(
                self.config, self.tokenizer, opened, prompts, max_new_tokens, max_masks
            )
            tiles = tile_arrays(self.config, opened, len(ids))
        with _timed(seconds, "ground"):
            inputs = (tiles, ids, source, lengths, frames, forced, limits, drawn(sampling))
            inputs = (*inputs, self._stop_text(), plan)
            result = jax.device_get(self.stages.ground(self.params, *inputs, objects=objects))

        answers, size = [], self.config.sam2.image_size
        for row, (request, prompt) in enumerate(zip(opened, prompts, strict=True)):
            said = result.ids[row, : int(result.count[row])].tolist()
            said = said[: end_of(self.tokenizer, said, int(limits.tokens[row]), int(limits.segs[row]))]
            count = len(self._seg_positions(said))
            segments: tuple[Segment, ...] = ()
            if request.image is not None and count > objects:
                raise InputError(
                    f"The answer to {request.prompt!r} has {count} masks but objects={objects} leaves room "
                    f"for fewer; raise it to {count}."
                )
            if request.image is not None and count:
                phrases = parse_answer(self.tokenizer.decode(said), request.prompt)
                masks, ious, scores = (
                    values[row][: len(request.image.frames), :count].swapaxes(0, 1) for values in result.masks
                )
                found = (masks, ious.max(-1), scores)
                with _timed(seconds, "resize masks"):
                    segments = full_size(request.image, *found, phrases, size, hide_absent)
            answers.append(self._answer(request, prompt, said, segments, seconds))
        return answers

    # ------------------------------------------------------------------------------------------ prompts

    def _opened(self, requests: Sequence[Request]) -> list[OpenedRequest]:
        opened = []
        for request in requests:
            image = request.image
            if image is not None and not isinstance(image, OpenedImage):
                image = self.open(image)
            opened.append(OpenedRequest(**{**vars(request), "image": image}))
        return opened

    def prompt_of(self, request: Request) -> Prompt:
        """Write a request on an opened image out as the model reads it.

        Raises:
            InputError: the prompt, the image, the regions and the history do not fit together.
        """
        return prompt_of(self.config, self.tokenizer, self._opened([request])[0])

    # ------------------------------------------------------------------------------------------- stages

    def _encode_visual(self, images: Sequence[OpenedImage]) -> None:
        """Make the rows for the language model; tiles of all images share a few compiled shapes."""
        images = [image for image in images if image.visual is None]
        if not images:
            return
        tiles = np.concatenate([image.tiles for image in images])
        with self.layout.inside():
            sizes = tile_chunks()
        encoded = []
        for chunk in chunks(len(tiles), sizes):
            rows = self.stages.encode_tiles(self.params, tiles[chunk])
            encoded += [(rows, tile) for tile in range(len(rows))]
        jax.block_until_ready(rows)
        found = iter(encoded)
        for image in images:
            image.visual = tuple(itertools.islice(found, len(image.tiles)))

    def _start(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        max_masks: int | None,
        sampling: Sampling | None,
    ) -> _Answering:
        """Read and encode what is asked, and say the first token of every answer."""
        seconds: dict[str, float] = defaultdict(float)
        with _timed(seconds, "read images"):
            opened = self._opened(requests)
            prompts = [self.prompt_of(request) for request in opened]
        with _timed(seconds, "encode tiles"):
            self._encode_visual(list({id(r.image): r.image for r in opened if r.image}.values()))
        arrays = prompt_arrays(self.config, self.tokenizer, opened, prompts, max_new_tokens, max_masks)
        with _timed(seconds, "prefill"):
            batch, length = arrays.ids.shape  # a prompt shows every visual row, so that it is as long
            visual = self.stages.blank_rows(self.params, batch=batch, length=length)
            for row, request in enumerate(opened):
                encoded = None if request.image is None else request.image.visual
                for number, (rows, tile) in enumerate(encoded or ()):
                    visual = self.stages.lay_tile(visual, rows, tile, row, number)
            prompt_inputs = (arrays.ids, arrays.source, arrays.lengths, visual, arrays.forced)
            state = self.stages.prefill(self.params, *prompt_inputs, arrays.limits, drawn(sampling))
            jax.block_until_ready(state.step)
        return _Answering(opened, prompts, arrays.limits, state, seconds)

    def _looks(self, answering: _Answering, tokens: int) -> Iterator[list[list[int]]]:
        """Say all answers to their ends; after every few tokens, what has been said, cut where it ends."""
        batch = len(answering.requests)
        tokens_of, segs_of = (np.asarray(limit).tolist() for limit in answering.limits)
        ends: list[int | None] = [None] * batch
        looked = 0
        while True:
            with _timed(answering.seconds, "decode"):
                step = int(answering.state.step)
                said = np.asarray(answering.state.ids)[:, :step]
                for row in range(batch):
                    if ends[row] is None:
                        ends[row] = end_of(
                            self.tokenizer, said[row].tolist(), tokens_of[row], segs_of[row], looked
                        )
                looked = step
                answering.said = [said[row, : ends[row]].tolist() for row in range(batch)]
            yield answering.said
            if all(end is not None for end in ends):
                return
            with _timed(answering.seconds, "decode"):
                done = np.array([*(end is not None for end in ends), *[True] * (len(said) - batch)])
                answering.state = self.stages.advance(self.params, answering.state, done, np.int32(tokens))

    def _finish(self, answering: _Answering, hide_absent: bool) -> list[Answer]:
        """The answers with their masks, once all is said; those of one image are decoded in one call."""
        seconds, said = answering.seconds, answering.said
        positions = [
            [] if request.image is None else self._seg_positions(ids)
            for request, ids in zip(answering.requests, said, strict=True)
        ]
        # The rows about each image that has masks.
        asked: dict[OpenedImage, list[int]] = defaultdict(list)
        for row, request in enumerate(answering.requests):
            if request.image is not None and positions[row]:
                asked[request.image].append(row)
        with self._encoding:
            for image in asked:
                self._encode_image(image, seconds)
        segments: dict[int, tuple[Segment, ...]] = {}
        with self._decoding:
            for image, rows in asked.items():
                places = [(row, place) for row in rows for place in positions[row]]
                places += places[:1] * (power_of_two(len(places)) - len(places))
                states = self.stages.states_at(answering.state.hidden, *np.array(places, np.int32).T)
                masks, ious, scores = self._segment(image, states, seconds)
                with _timed(seconds, "resize masks"):
                    start = 0
                    for row in rows:
                        own = slice(start, start + len(positions[row]))
                        prompt, size = answering.requests[row].prompt, self.config.sam2.image_size
                        phrases = parse_answer(self.tokenizer.decode(said[row]), prompt)
                        found = (masks[own], ious[own], scores[own])
                        segments[row] = full_size(image, *found, phrases, size, hide_absent)
                        start = own.stop
        return [
            self._answer(request, prompt, said[row], segments.get(row, ()), seconds)
            for row, (request, prompt) in enumerate(zip(answering.requests, answering.prompts, strict=True))
        ]

    def _encode_image(self, image: OpenedImage, seconds: dict[str, float]) -> None:
        """Make SAM2's features of a single image; those of a volume are made as it is followed."""
        with image.encoding:
            if image.features is None and not image.is_volume:
                with _timed(seconds, "encode image"):
                    pixels = sam_image(image.frames[0], self.config.sam2.image_size)[None]
                    image.features = jax.block_until_ready(self.stages.encode_image(self.params, pixels))

    def _segment(
        self, image: OpenedImage, hidden: Float[jax.Array, "objects embed"], seconds: dict[str, float]
    ) -> tuple[
        Float32[np.ndarray, "objects frames M M"],
        Float32[np.ndarray, "objects frames"],
        Float32[np.ndarray, "objects frames"],
    ]:
        """Logits of the masks, their predicted IoUs, logits of the objects' presence, of one image."""
        if image.is_volume:
            with _timed(seconds, "segment volume"):
                frames, plan = volume_arrays(self.config.sam2, image)
                decoded = self.stages.segment_frames(self.params, frames, hidden, plan)
                masks, ious, scores = (
                    np.asarray(x)[: len(image.frames)].swapaxes(0, 1)
                    for x in (decoded.masks, decoded.ious.max(-1), decoded.object_scores)
                )
            return masks, ious, scores
        with _timed(seconds, "decode masks"):
            decoded = self.stages.segment(self.params, image.features, hidden)
            masks = np.asarray(decoded.masks)[0][:, None]
            ious = np.asarray(decoded.ious)[0].max(-1)[:, None]
            scores = np.asarray(decoded.object_scores)[0][:, None]
        return masks, ious, scores

    # ------------------------------------------------------------------------------------------ answers

    def _seg_positions(self, ids: Sequence[int]) -> list[int]:
        """Where an answer says [SEG] and has a state for it: not as its very last token."""
        return [step for step, token in enumerate(ids[:-1]) if token == self.tokenizer.seg_id]

    def _answer(
        self,
        request: OpenedRequest,
        prompt: Prompt,
        ids: list[int],
        segments: tuple[Segment, ...],
        seconds: dict[str, float],
    ) -> Answer:
        text = self.tokenizer.decode(ids)
        return Answer(
            prompt=request.prompt,
            text=text.strip(),
            segments=segments,
            records=() if request.image is None else request.image.records,
            transcript=prompt.text + text,
            seconds=seconds,
            image=None if request.image is None else request.image.identity,
            visual_tokens=prompt.visual_tokens,
        )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - begin


def drawn(sampling: Sampling | None) -> Draw | None:
    """How tokens are drawn, for the device."""
    if sampling is None:
        return None
    temperature = max(sampling.temperature, np.finfo(np.float32).tiny)  # not rounded to 0
    top_p = None if sampling.top_p == 1 else np.float32(sampling.top_p)
    return Draw(np.float32(temperature), top_p, np.uint32(sampling.seed))
