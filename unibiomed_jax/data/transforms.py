"""One record to the arrays of one sample: pixels, tokens, labels, masks."""

import logging
import multiprocessing
import os
from collections.abc import Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image
from scipy import ndimage

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.data.augment import AugmentConfig, augment
from unibiomed_jax.data.files import require_mask_size, require_table_size
from unibiomed_jax.data.packed import PackedRecords
from unibiomed_jax.data.prompts import Conversation, PromptConfig, draw, variants
from unibiomed_jax.data.records import TEXT_ONLY, Kind, Record
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import shown
from unibiomed_jax.inputs.images import open_frames
from unibiomed_jax.inputs.masks import open_mask
from unibiomed_jax.inputs.prompt import (
    INFERENCE_TURN,
    STOP_TEXT,
    TRAINING_TURN,
    build_prompt,
    expand,
    visual_tokens,
)
from unibiomed_jax.inputs.shards import StoredFile
from unibiomed_jax.inputs.tiles import frame_tiles, image_tiles, sam_image, tile_grid
from unibiomed_jax.inputs.tokenizer import (
    IMAGE_CONTEXT,
    PHRASE_END,
    PHRASE_START,
    UNIBIOMED_TOKENS,
    Tokenizer,
)
from unibiomed_jax.masks.resize import resize_nearest

logger = logging.getLogger(__name__)

# Labels of tokens that are not learned.
IGNORE = -100

# After the answer of these the reference writes a newline, which is not learned.
_NEWLINE_AT_END = (Kind.VQA, Kind.REPORT, Kind.SEQUENCE)

_BOX_COLOUR = (0, 255, 0)

# A region whose bounding box has this many pixels or fewer is boxed only if no other is left.
_SMALL_BOX = 400

# Texts whose token counts are kept.
_REMEMBERED = 1 << 16

# Records whose texts a process measures at once, and the most processes that do.
_SHARE, _MAX_PROCESSES = 50_000, 32
# That a processor core takes for the texts of a record, about.
_SECONDS = 3e-4


@dataclass(frozen=True)
class SampleConfig:
    """Choices about samples; their sizes follow from the model (`SampleSizes`)."""

    # Most tiles of an image for region understanding and captions, which the weights saw as a single one.
    text_only_max_tiles: int = 1
    # Longest sample, tokens.
    max_tokens: int = 8192
    # Random changes of images and masks; none as in the reference.
    augment: AugmentConfig | None = None
    # Questions and answers.
    prompts: PromptConfig = field(default_factory=PromptConfig)


@dataclass(frozen=True)
class SampleSizes:
    """Sizes of a sample's arrays."""

    # Side of a tile, pixels, and the visual tokens it becomes.
    tile_size: int
    tokens_per_tile: int
    # Limits of the number of tiles an image is cut into, and the whole image as a last one.
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    # Sides of SAM2's image and of its masks, pixels.
    sam_size: int
    mask_size: int

    @classmethod
    def of(cls, model: ModelConfig) -> "SampleSizes":
        """The sizes that a model reads."""
        return cls(
            tile_size=model.vision.image_size,
            tokens_per_tile=model.tokens_per_tile,
            min_tiles=model.min_tiles,
            max_tiles=model.max_tiles,
            use_thumbnail=model.use_thumbnail,
            sam_size=model.sam2.image_size,
            mask_size=model.sam2.image_size // 4,
        )


@dataclass(frozen=True)
class Sample:
    """The arrays of one record. Pixels are bytes, normalised on the device."""

    name: str
    pixel_values: UInt8[np.ndarray, "tiles side side 3"]
    input_ids: Int32[np.ndarray, " tokens"]
    labels: Int32[np.ndarray, " tokens"]
    sam_pixels: UInt8[np.ndarray, "frames size size 3"]
    masks: UInt8[np.ndarray, "objects frames mask mask"]


class SampleBuilder:
    """Turns records into samples; the only randomness comes from the generator of each call."""

    def __init__(self, config: SampleConfig, sizes: SampleSizes, tokenizer: Tokenizer, seed: int):
        self.config = config
        self.sizes = sizes
        self.tokenizer = tokenizer
        self.seed = seed
        phrase_marks = (PHRASE_START, PHRASE_END) if config.prompts.phrase_marks == "text" else ()
        # Special tokens that are ordinary text in the words of a task.
        self._plain = dict.fromkeys((Kind.VQA, Kind.REPORT), phrase_marks)
        self._plain |= dict.fromkeys(TEXT_ONLY, UNIBIOMED_TOKENS)
        # Tokenizers that read them so, made when first needed.
        self._plain_tokenizers: dict[tuple[str, ...], Tokenizer] = {}
        # Token counts, since most texts occur many times: of questions and answers, and of all of a record.
        self._lengths: dict[tuple[Kind, str, int], int] = {}
        self._text_lengths: dict[tuple, int] = {}

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        """Read and build one sample.

        Raises:
            InputError: a file that cannot be read, an image of another size than the table says, a mask of
                another size than its image, or a text that does not fit; the message names the record.
        """
        config, sizes = self.config, self.sizes
        chosen = _draw_slices(record, rng) if record.kind is Kind.SEQUENCE else [0]
        frames = open_frames([record.images[index] for index in chosen])[0]
        size = frames[0].size
        require_table_size(record, record.images[chosen[0]], size)  # which gives the batch its tiles
        masks = np.zeros((len(record.masks), len(chosen), *size[::-1]), bool)
        for number, files in enumerate(record.masks):
            masks[number] = [load_mask(files[index], size, record.name) for index in chosen]
        if (changes := record.augment or config.augment) is not None:
            frames, masks = augment(frames, masks, changes, rng)
        if record.kind is Kind.SEQUENCE:
            tiles = frame_tiles(frames, tile_size=sizes.tile_size)
        else:
            image = frames[0]
            if record.kind is Kind.REGION:
                image = Image.fromarray(draw_box(np.asarray(image), masks[0, 0], rng))
            tiles, _ = image_tiles(image, **self._tiling(record.kind), use_thumbnail=sizes.use_thumbnail)
        ids, labels = self.encode(record, draw(record, rng, self.seed, config.prompts), len(tiles))
        grounded = record.kind not in TEXT_ONLY
        sam = [sam_image(frame, sizes.sam_size) for frame in frames] if grounded else []
        return Sample(
            record.name,
            tiles,
            ids,
            labels,
            np.stack(sam) if sam else np.zeros((0, sizes.sam_size, sizes.sam_size, 3), np.uint8),
            resize_nearest(masks, sizes.mask_size) if grounded else self._no_masks(),
        )

    def encode(
        self, record: Record, conversation: Conversation, tiles: int
    ) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
        """Token ids and labels of one turn.

        The instruction (question in its template) and the answer with its end mark are tokenised as one
        string each, because byte pairs merge across what looks like their parts. The answer and the end mark
        are learned. What exceeds max_tokens is cut off at the end.

        Raises:
            InputError: the cut would lose a [SEG] or all that is learned, or the record's own words contain
                a [SEG].
        """
        instruction, answer, end = self._segments(record, conversation, tiles)
        if len(instruction) >= self.config.max_tokens:
            raise InputError(
                f"{record.name} has {len(instruction)} tokens before its answer, and max_tokens="
                f"{self.config.max_tokens} would cut all of it; raise max_tokens, take fewer tiles or "
                "shorten its question."
            )
        ids = np.array(instruction + answer + end, np.int32)
        labels = np.array([IGNORE] * len(instruction) + answer + [IGNORE] * len(end), np.int32)
        ids, labels = ids[: self.config.max_tokens], labels[: self.config.max_tokens]
        wanted = len(record.masks) if record.kind not in TEXT_ONLY else 0
        found = int((ids == self.tokenizer.seg_id).sum())
        if found < wanted and len(instruction) + len(answer) > self.config.max_tokens:
            raise InputError(
                f"{record.name} has {len(instruction) + len(answer)} tokens, and cutting it to max_tokens="
                f"{self.config.max_tokens} would lose a [SEG]; raise max_tokens or shorten its text."
            )
        if found != wanted:
            raise InputError(
                f"{record.name} makes {found} [SEG] for {wanted} masks; remove [SEG] from its own words."
            )
        return ids, labels

    def tiles(self, kind: Kind, size: tuple[int, int]) -> int:
        """Tiles of an image of this size, (width, height) in pixels, thumbnail included."""
        columns, rows = tile_grid(*size, **self._tiling(kind))
        count = columns * rows
        return count + (count > 1 and self.sizes.use_thumbnail)

    def text_length(self, record: Record) -> int:
        """Tokens beside those of the tiles in the longest sample that any draw of words can give.

        Raises:
            InputError: the record's words contain the mark of an image.
        """
        words = (record.kind, record.texts, record.anatomy, record.report, record.question, record.slices)
        if words not in self._text_lengths:
            asked, answered = variants(record, self.config.prompts)
            tiles = record.slices or 1
            try:
                longest = max(self._length(record.kind, text, tiles) for text in asked)
                longest += max(self._length(record.kind, text, 0) for text in answered)
            except InputError as error:
                raise InputError(f"{record.name}: {error}") from error
            longest += len(self._end(record.kind)) - tiles * self.sizes.tokens_per_tile
            _remember(self._text_lengths, words, longest)
        return self._text_lengths[words]

    def text_lengths(self, records: Sequence[Record]) -> Int32[np.ndarray, " records"]:
        """`text_length` of many records of one kind; those of packed ones are measured once and kept."""
        if isinstance(records, PackedRecords):
            key = f"{self.config.prompts} {self.tokenizer.backend.to_str()}"
            return records.text_lengths(key, self._measure)
        return self._measure(records)

    def require_fit(self, record: Record, tiles: int) -> None:
        """Raise InputError if cutting the record to max_tokens would lose a [SEG] or the whole answer."""
        asked, answered = variants(record, self.config.prompts)
        for question in asked:
            for answer in answered:
                self.encode(record, Conversation(question, answer), tiles)

    def _measure(self, records: Sequence[Record]) -> np.ndarray:
        if len(records) <= _SHARE or not isinstance(records, PackedRecords):
            return np.fromiter(map(self.text_length, records), np.int32, len(records))
        processes = min(os.cpu_count() or 1, _MAX_PROCESSES)
        logger.warning(
            "Measuring the texts of %d records of %s, once for this tokenizer: about %d minutes, which "
            "`unibiomed data pack --tokenizer` takes while packing.",
            len(records),
            records.config.title,
            -(-len(records) * _SECONDS // (60 * processes)),
        )
        context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
        with ProcessPoolExecutor(processes, context, _start_measuring, (self, records)) as pool:
            firsts = range(0, len(records), _SHARE)
            ends = (min(first + _SHARE, len(records)) for first in firsts)
            return np.concatenate(list(pool.map(_measure_share, firsts, ends)))

    def _length(self, kind: Kind, text: str, tiles: int) -> int:
        key = (kind, text, tiles)
        if key not in self._lengths:
            tokens = self._instruction(kind, text, tiles) if tiles else self._answer(kind, text)
            _remember(self._lengths, key, len(tokens))
        return self._lengths[key]

    def _segments(
        self, record: Record, conversation: Conversation, tiles: int
    ) -> tuple[list[int], list[int], list[int]]:
        kind = record.kind
        return (
            self._instruction(kind, conversation.question, tiles),
            self._answer(kind, conversation.answer),
            self._end(kind),
        )

    def _instruction(self, kind: Kind, question: str, tiles: int) -> list[int]:
        turn = TRAINING_TURN if self.config.prompts.turn == "training" else INFERENCE_TURN
        frames = tiles if kind is Kind.SEQUENCE else 0
        text = build_prompt(question.strip(), image=not frames, frames=frames, turn=turn)
        counts = visual_tokens(0 if frames else tiles, frames, self.sizes.tokens_per_tile)
        return expand(self._encode(kind, text), self.tokenizer.image_context_id, counts)

    def _answer(self, kind: Kind, answer: str) -> list[int]:
        ids = self._encode(kind, answer.strip() + STOP_TEXT)
        if self.tokenizer.image_context_id in ids:
            raise InputError(
                f"its words contain {IMAGE_CONTEXT}, which stands for a piece of the image; remove it."
            )
        return ids

    def _end(self, kind: Kind) -> list[int]:
        return self.tokenizer.encode("\n") if kind in _NEWLINE_AT_END else []

    def _encode(self, kind: Kind, text: str) -> list[int]:
        plain = self._plain.get(kind, ())
        if not any(token in text for token in plain):
            return self.tokenizer.encode(text)
        if plain not in self._plain_tokenizers:
            self._plain_tokenizers[plain] = self.tokenizer.with_plain_text(*plain)
        return self._plain_tokenizers[plain].encode(text)

    def _tiling(self, kind: Kind) -> dict[str, int]:
        """The arguments of `tile_grid` for a task."""
        sizes = self.sizes
        limit = self.config.text_only_max_tiles if kind in TEXT_ONLY else sizes.max_tiles
        least = min(sizes.min_tiles, limit)
        return {"tile_size": sizes.tile_size, "min_tiles": least, "max_tiles": limit}

    def _no_masks(self) -> np.ndarray:
        return np.zeros((0, 0, self.sizes.mask_size, self.sizes.mask_size), np.uint8)


# Of a process that measures texts.
_measured: tuple[SampleBuilder, PackedRecords] | None = None


def _start_measuring(builder: SampleBuilder, records: PackedRecords) -> None:
    global _measured
    _measured = builder, records


def _measure_share(first: int, end: int) -> np.ndarray:
    builder, records = _measured
    return np.fromiter(map(builder.text_length, records.span(first, end)), np.int32)


def _remember(known: dict, key: Hashable, value: int) -> None:
    """Keep a value, and not ever more of them where no text occurs twice."""
    if len(known) >= _REMEMBERED:
        known.clear()
    known[key] = value


def load_mask(path: str | StoredFile, size: tuple[int, int], name: str) -> Bool[np.ndarray, "height width"]:
    """A mask file, upright as its image is (see `open_mask`); an empty path is an all-zero mask.

    Raises:
        InputError: the file cannot be used, or is not of the image's `size` (width, height).
    """
    if not path:
        return np.zeros(size[::-1], bool)
    try:
        mask = open_mask(path)
    except InputError as error:
        raise InputError(f"The mask {shown(path)} of {name} cannot be read: {error}") from error
    require_mask_size(name, path, mask.shape[::-1], size)
    return mask


def draw_box(
    pixels: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "height width 3"]:
    """The image with a green box around one connected region of the mask, as the region task shows it.

    A random region among those whose bounding box has more than 400 pixels, else any; an empty mask leaves
    the image as it is. The line equals OpenCV's rectangle of thickness 2: three pixels wide, without its four
    outermost corners.
    """
    labels, count = ndimage.label(ndimage.binary_fill_holes(mask), np.ones((3, 3)))
    if not count:
        return pixels
    boxes = [
        (columns.start, rows.start, columns.stop, rows.stop) for rows, columns in ndimage.find_objects(labels)
    ]
    boxes = [boxes[index] for index in rng.permutation(count)]
    large = [box for box in boxes if (box[2] - box[0]) * (box[3] - box[1]) > _SMALL_BOX]
    left, top, right, bottom = (large or boxes)[0]
    height, width = mask.shape
    rows, columns = np.arange(height)[:, None], np.arange(width)
    outer = (rows >= top - 1) & (rows <= bottom + 1) & (columns >= left - 1) & (columns <= right + 1)
    inner = (rows > top + 1) & (rows < bottom - 1) & (columns > left + 1) & (columns < right - 1)
    corner = ((rows == top - 1) | (rows == bottom + 1)) & ((columns == left - 1) | (columns == right + 1))
    pixels = pixels.copy()
    pixels[outer & ~inner & ~corner] = _BOX_COLOUR
    return pixels


def _draw_slices(record: Record, rng: np.random.Generator) -> Sequence[int]:
    """Sorted slice numbers: without repeats when the volume has more than one slice to spare, else with."""
    spare = len(record.images) > record.slices + 1
    return np.sort(rng.choice(len(record.images), record.slices, replace=not spare)).tolist()
