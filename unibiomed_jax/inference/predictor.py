"""Ask an image a question: `UniBiomed.from_pretrained(path).predict(image, prompt)`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float32, Int
from PIL import Image

from unibiomed_jax import checkpoint, runtime
from unibiomed_jax.config import ModelConfig, Precision
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference import generate
from unibiomed_jax.inference.buckets import frame_bucket, in_chunks, power_of_two, tile_chunks, token_bucket
from unibiomed_jax.inference.cpu import split_linears, stored_in_bfloat16
from unibiomed_jax.inference.masks import upscale_masks
from unibiomed_jax.inference.precision import FLOAT32, cast_parameters, default_precision
from unibiomed_jax.inference.preprocess import (
    ImageRecord,
    ImageSource,
    box_masks,
    frame_tiles,
    open_frames,
    open_image,
    region_cells,
    sam_bytes,
    sam_image,
    tile_grid,
    vit_tiles,
)
from unibiomed_jax.inference.prompt import STOP_TEXT, Phrase, build_prompt, find_stop, parse_answer
from unibiomed_jax.inference.tokenizer import Tokenizer
from unibiomed_jax.models.layers import unstack_layers
from unibiomed_jax.models.sam2 import ImageFeatures, plan_frames
from unibiomed_jax.models.unibiomed import UniBiomedModel

INTENDED_USE = (
    "For research use only; not a medical device. Text and masks may be wrong or incomplete: "
    "a qualified expert must review them before anybody relies on them."
)

# Tokens between two looks of the host at the text. The loop also stops by itself where the text may end.
TOKENS_PER_LOOK = 64


@dataclasses.dataclass(frozen=True)
class Segment:
    """What one `[SEG]` of an answer points at."""

    # The words it stands for: the <p>...</p> before it, or the sentence around it.
    phrase: str
    # True inside; (height, width) of the image, or (frames, height, width) of a volume.
    mask: Bool[np.ndarray, "*frames height width"]
    # The logits of the mask at the same size: mask = logits > 0.
    logits: Float32[np.ndarray, "*frames height width"]
    # IoU with the truth as the model itself predicts it, 0 to 1; one a frame for a volume.
    iou: float | list[float]
    # Logit of "the object is in the image"; reported, never used to hide a mask unless asked.
    object_score: float | list[float]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says to one request."""

    # The question, as it was asked.
    prompt: str
    # The answer as generated: special tokens and the stop text `<|end|>` are kept.
    text: str
    # One entry a `[SEG]`; a `[SEG]` that is the very last token has no state and so no entry.
    segments: tuple[Segment, ...]
    # How each image was read.
    records: tuple[ImageRecord, ...]
    # The whole conversation so far; pass the answer as `history` of the next request on the same image.
    transcript: str
    # Seconds by stage, of the whole batch this request was part of.
    seconds: Mapping[str, float]
    # To be shown with every answer.
    notice: str = INTENDED_USE
    # `OpenedImage.identity` of the image it is about.
    image: str | None = None


class OpenedImage:
    """An image, or the frames of a volume: read once, and encoded once for any number of questions."""

    def __init__(
        self,
        frames: Sequence[Image.Image],
        records: Sequence[ImageRecord],
        tiles: Float32[np.ndarray, "tiles side side 3"],
        conditioning: Sequence[int] | None = None,
    ):
        self.frames = tuple(frames)
        self.records = tuple(records)
        # sha256 of all sizes and pixels, by which the same image opened again is known.
        self.identity = _identity(self.frames)
        # Frames that the language model sees and that are segmented from its words; None for a single image.
        self.conditioning = None if conditioning is None else tuple(conditioning)
        self.num_tiles = len(tiles)
        # Input of the vision model, until it is encoded at the first question.
        self.tiles: np.ndarray | None = tiles
        # Rows for the language model, (tiles * tokens, embed).
        self.visual: np.ndarray | None = None
        # SAM2's features of a single image; made at the first `[SEG]`.
        self.features: ImageFeatures | None = None

    @property
    def is_volume(self) -> bool:
        return self.conditioning is not None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size


@dataclasses.dataclass(frozen=True)
class Request:
    """One question about one image, one volume, or nothing but words."""

    prompt: str
    # The image, or what `UniBiomed.open` or `open_volume` made of it; None for words alone.
    image: ImageSource | OpenedImage | None = None
    # Regions that the question refers to, as masks of the image's size ...
    regions: Sequence[np.ndarray] = ()
    # ... or as boxes (x0, y0, x1, y1) in pixels.
    boxes: Sequence[Sequence[float]] = ()
    # The answer to the previous question about the same image, opened again or not; of another it is refused.
    history: Answer | None = None
    # Tokens to say at given steps whatever the model prefers: {step: id}.
    forced: Mapping[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request as the model reads it."""

    text: str
    ids: list[int]
    # For every <IMG_CONTEXT> in turn, the row of the image's visual tokens that takes its place.
    rows: Int[np.ndarray, " places"]


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
    ):
        """`params` is the parameter tree of `UniBiomedModel(config)`."""
        runtime.prepare()
        precision = precision or default_precision()
        self.config = dataclasses.replace(config, precision=precision)
        self.tokenizer = tokenizer
        self.checkpoint_hash = checkpoint_hash
        model = nnx.eval_shape(lambda: UniBiomedModel(self.config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        on_cpu = jax.default_backend() == "cpu"
        splits = on_cpu and precision.language == "float32" and stored_in_bfloat16(params["language_model"])
        stored = dataclasses.replace(precision, language="bfloat16") if splits else precision
        nnx.replace_by_pure_dict(state, cast_parameters(params, self.config, stored))
        model = nnx.merge(graphdef, state)
        if on_cpu:
            # A scan would copy every layer's weights out of the stack for every token.
            model.language_model.layers = unstack_layers(model.language_model.layers)
        if splits:
            split_linears(model.language_model, exact=precision == FLOAT32)
        self.graphdef, self.params = nnx.split(model)
        self._compile()

    @classmethod
    def from_pretrained(cls, path: str | Path, *, precision: Precision | None = None) -> UniBiomed:
        """Load a converted checkpoint directory, or a released one (which is converted in memory).

        Raises:
            InputError: the directory or a file of it is missing, damaged or of another model.
        """
        path = Path(path)
        if checkpoint.is_checkpoint(path):
            loaded = checkpoint.load(path)
        else:
            from convert.from_torch import read_released  # conversion builds on this library, not it on that

            loaded = read_released(path)
        return cls(
            loaded.config,
            loaded.params,
            Tokenizer.from_folder(loaded.tokenizer),
            precision=precision,
            checkpoint_hash=loaded.hash,
        )

    # ---------------------------------------------------------------------------------------- questions

    def open(self, image: ImageSource) -> OpenedImage:
        """Read an image, for several questions about it."""
        config = self.config
        frame, record = open_image(image)
        tiles = vit_tiles(
            frame,
            tile_size=config.vision.image_size,
            min_tiles=config.min_tiles,
            max_tiles=config.max_tiles,
            use_thumbnail=config.use_thumbnail,
        )
        side = config.vision.image_size
        columns, rows = tile_grid(
            *frame.size, min_tiles=config.min_tiles, max_tiles=config.max_tiles, tile_size=side
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
        tiles = frame_tiles([images[i] for i in chosen], tile_size=self.config.vision.image_size)
        side = self.config.vision.image_size
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
        hide_absent: bool = False,
    ) -> Answer:
        """Answer one question; see `Request` for the arguments and `predict_batch` for the rest."""
        request = Request(prompt, image, regions, boxes, history)
        return self.predict_batch([request], max_new_tokens=max_new_tokens, hide_absent=hide_absent)[0]

    def predict_batch(
        self, requests: Sequence[Request], *, max_new_tokens: int = 2048, hide_absent: bool = False
    ) -> list[Answer]:
        """Answer several questions about different images in one go, with the answers of one by one.

        Args:
            requests: the questions.
            max_new_tokens: longest answer in tokens, shortened where the model's context ends.
            hide_absent: empty the masks (frame by frame) whose object score is not above 0. The reference
                never does, so that masks of things that are not there stay.

        Raises:
            InputError: a request that cannot be answered; none of the batch is.
        """
        if not requests:
            return []
        seconds: dict[str, float] = defaultdict(float)
        with _timed(seconds, "read images"):
            requests = [
                request
                if request.image is None or isinstance(request.image, OpenedImage)
                else dataclasses.replace(request, image=self.open(request.image))
                for request in requests
            ]
            prompts = [self.prompt_of(request) for request in requests]
        with _timed(seconds, "encode tiles"):
            self._encode_visual(list({id(r.image): r.image for r in requests if r.image}.values()))
        said, hidden = self._generate(requests, prompts, max_new_tokens, seconds)

        answers = []
        for request, prompt, ids, states in zip(requests, prompts, said, hidden, strict=True):
            text = self.tokenizer.decode(ids)
            positions = [t for t, token in enumerate(ids[:-1]) if token == self.tokenizer.seg_id]
            segments: tuple[Segment, ...] = ()
            if request.image is not None and positions:
                phrases = parse_answer(text, request.prompt)
                segments = self._segment(request.image, states[positions], phrases, hide_absent, seconds)
            answers.append(
                Answer(
                    prompt=request.prompt,
                    text=text.strip(),
                    segments=segments,
                    records=() if request.image is None else request.image.records,
                    transcript=prompt.text + text,
                    seconds=seconds,
                    image=None if request.image is None else request.image.identity,
                )
            )
        return answers

    # ------------------------------------------------------------------------------------------- stages

    def _compile(self) -> None:
        """One compiled function a stage; the parameters are an argument, so that nothing is baked in."""
        graphdef = self.graphdef

        def stage(function, **jit_options):
            def run(params, *arguments):
                return function(nnx.merge(graphdef, params), *arguments)

            compiled = jax.jit(run, **jit_options)

            def call(*arguments):
                # float32 means float32 on every backend; bfloat16 products are not touched by this.
                with jax.default_matmul_precision("highest"):
                    return compiled(self.params, *arguments)

            call.compiled = compiled
            return call

        ids = self.tokenizer
        pause_id = ids.encode(STOP_TEXT)[-1]
        self.stages = {
            "encode_tiles": stage(UniBiomedModel.encode_tiles),
            "start": stage(generate.start),
            "advance": stage(
                functools.partial(generate.advance, end_id=ids.eos_id, pause_id=pause_id), donate_argnums=1
            ),
            "encode_image": stage(UniBiomedModel.encode_image),
            "segment": stage(UniBiomedModel.segment),
            "segment_frames": stage(UniBiomedModel.segment_frames),
        }

    def _encode_visual(self, images: Sequence[OpenedImage]) -> None:
        """Fill in the rows for the language model; tiles of all images share a few compiled shapes."""
        images = [image for image in images if image.visual is None]
        if not images:
            return
        tiles = np.concatenate([image.tiles for image in images])
        rows = in_chunks(self.stages["encode_tiles"], tiles, tile_chunks())
        bounds = np.cumsum([image.num_tiles for image in images])[:-1]
        for image, part in zip(images, np.split(rows, bounds), strict=True):
            image.visual, image.tiles = part.reshape(-1, part.shape[-1]), None

    def prompt_of(self, request: Request) -> Prompt:
        """Write a request on an opened image out as the model reads it.

        Raises:
            InputError: the prompt, the image, the regions and the history do not fit together.
        """
        config, image = self.config, request.image
        is_volume = image is not None and image.is_volume
        cells = None
        if len(request.regions) or len(request.boxes):
            if image is None or is_volume:
                raise InputError("Regions and boxes need a single image; give the image they are drawn on.")
            boxes = box_masks(request.boxes, image.size) if len(request.boxes) else ()
            cells = region_cells([*request.regions, *boxes], image.size, config.token_grid)
        if image and request.history and request.history.image not in (None, image.identity):
            raise InputError(
                "The history is about another image than the one given; give that image again, or leave out "
                "the history."
            )
        tiles = 0 if image is None else image.num_tiles
        text = build_prompt(
            request.prompt,
            tiles=0 if is_volume else tiles,
            frames=tiles if is_volume else 0,
            tokens_per_tile=config.tokens_per_tile,
            region_cells=() if cells is None else [int(cell.sum()) for cell in cells],
            past_text="" if request.history is None else request.history.transcript,
        )
        rows = np.arange(tiles * config.tokens_per_tile)
        if cells is not None:  # a region's tokens repeat those of the last tile that lie in it
            last_tile = rows[-config.tokens_per_tile :]
            rows = np.concatenate([rows, *(last_tile[cell.reshape(-1)] for cell in cells)])
        ids = self.tokenizer.encode(text)
        context = config.language.max_position_embeddings
        if len(ids) >= context:
            raise InputError(
                f"The prompt has {len(ids)} tokens but the model's context holds {context}; shorten the "
                "text, or lower max_tiles in the checkpoint's config.json."
            )
        return Prompt(text, ids, rows)

    def _generate(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        seconds: dict[str, float],
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids and hidden states of every answer, cut where the reference stops."""
        batch = len(prompts)
        lengths = np.array([len(prompt.ids) for prompt in prompts], np.int32)
        context = self.config.language.max_position_embeddings
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; at least one token must be generated.")
        new = int(min(max_new_tokens, context - lengths.max()))
        length = token_bucket(int(lengths.max()))
        rows = power_of_two(batch)  # those beyond the batch are one token long and done at once
        lengths = np.pad(lengths, (0, rows - batch), constant_values=1)
        ids = np.full((rows, length), self.tokenizer.pad_id, np.int32)
        source = np.full((rows, length), -1, np.int32)
        visual = np.zeros((rows * length, self.config.language.hidden_size), np.float32)
        for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            ids[i, : lengths[i]] = prompt.ids
            if request.image is not None:
                places = np.flatnonzero(ids[i] == self.tokenizer.image_context_id)
                source[i, places] = i * length + np.arange(len(places))
                visual[i * length + np.arange(len(places))] = request.image.visual[prompt.rows]
        slots = token_bucket(new)
        forced = np.full((rows, slots), -1, np.int32)
        for i, request in enumerate(requests):
            for step, token in request.forced.items():
                if step < new:
                    forced[i, step] = token

        with _timed(seconds, "prefill"):
            state = self.stages["start"](ids, source, lengths, visual, forced)
            jax.block_until_ready(state.step)
        with _timed(seconds, "decode"):
            return self._decode(state, batch, new)

    def _decode(
        self, state: generate.Decoding, batch: int, new: int
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids and hidden states of the first `batch` rows."""
        ends: list[int | None] = [None] * batch
        looked = 0
        while True:
            step = int(state.step)
            said = np.asarray(state.ids)[:, :step]
            for i in range(batch):
                if ends[i] is None:
                    ends[i] = find_stop(self.tokenizer, said[i].tolist(), looked)
            looked = step
            if step >= new or all(end is not None for end in ends):
                break
            done = np.array([*(end is not None for end in ends), *[True] * (len(state.lengths) - batch)])
            limit = np.int32(min(TOKENS_PER_LOOK, new - step))
            state = self.stages["advance"](state, done, limit)
        hidden = np.asarray(state.hidden)
        counts = [step if end is None else end for end in ends]
        return [said[i, :n].tolist() for i, n in enumerate(counts)], [hidden[i] for i in range(batch)]

    def _segment(
        self,
        image: OpenedImage,
        hidden: Float32[np.ndarray, "objects embed"],
        phrases: Sequence[Phrase],
        hide_absent: bool,
        seconds: dict[str, float],
    ) -> tuple[Segment, ...]:
        """All `[SEG]` of one answer in one call; the number of objects is padded to a bucket."""
        count = len(hidden)
        slots = power_of_two(count)
        padded = np.concatenate([hidden, np.repeat(hidden[:1], slots - count, axis=0)])
        size = self.config.sam2.image_size
        if image.is_volume:
            with _timed(seconds, "segment volume"):
                frames = np.zeros((frame_bucket(len(image.frames)), size, size, 3), np.uint8)
                for i, frame in enumerate(image.frames):
                    frames[i] = sam_bytes(frame, size)
                plan = plan_frames(
                    len(image.frames), self.config.sam2, image.conditioning, padded_to=len(frames)
                )
                decoded = self.stages["segment_frames"](frames, padded, plan)
                masks, ious, scores = (
                    np.asarray(x)[: len(image.frames)].swapaxes(0, 1)
                    for x in (decoded.masks, decoded.ious.max(-1), decoded.object_scores)
                )
        else:
            if image.features is None:
                with _timed(seconds, "encode image"):
                    pixels = sam_image(image.frames[0], size)[None]
                    image.features = jax.block_until_ready(self.stages["encode_image"](pixels))
            with _timed(seconds, "decode masks"):
                decoded = self.stages["segment"](image.features, padded[None])
                masks = np.asarray(decoded.masks)[0][:, None]
                ious = np.asarray(decoded.ious)[0].max(-1)[:, None]
                scores = np.asarray(decoded.object_scores)[0][:, None]
        width, height = image.size
        segments = []
        with _timed(seconds, "resize masks"):
            for i in range(count):
                logits = upscale_masks(masks[i], (height, width), size)
                if hide_absent:
                    logits = np.where(scores[i][:, None, None] > 0, logits, -np.abs(logits))
                drop = (lambda x: x) if image.is_volume else (lambda x: x[0])
                segments.append(
                    Segment(
                        phrase=phrases[i].text,
                        mask=drop(logits > 0),
                        logits=drop(logits),
                        iou=drop(ious[i].tolist()),
                        object_score=drop(scores[i].tolist()),
                    )
                )
        return tuple(segments)


def _identity(frames: Sequence[Image.Image]) -> str:
    digest = hashlib.sha256(repr([frame.size for frame in frames]).encode())
    for frame in frames:
        digest.update(np.asarray(frame))
    return digest.hexdigest()


@contextmanager
def _timed(seconds: dict[str, float], stage: str):
    begin = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - begin
