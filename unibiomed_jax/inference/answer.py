"""What is asked and what is answered: requests, opened images, answers."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from PIL import Image

from unibiomed_jax.config.fields import ABOVE_ZERO, POSITIVE_SHARE, SEED, require_limits
from unibiomed_jax.inputs.images import ImageRecord, ImageSource
from unibiomed_jax.models.sam2 import ImageFeatures

INTENDED_USE = (
    "For research use only; not a medical device. Text and masks may be wrong or incomplete: "
    "a qualified expert must review them before anybody relies on them."
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """What one `[SEG]` of an answer points at."""

    # The words it stands for: the <p>...</p> before it, or the sentence around it.
    phrase: str
    # True inside; (height, width) of the image, or (frames, height, width) of a volume.
    mask: Bool[np.ndarray, "*frames height width"]
    # The logits of the mask at the same size: mask = logits > 0.
    logits: Float32[np.ndarray, "*frames height width"]
    # IoU with the truth as the model itself predicts it, 0 to 1; one per frame for a volume.
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
    # One entry per `[SEG]`; a `[SEG]` that is the very last token has no state and so no entry.
    segments: tuple[Segment, ...]
    # How each image was read.
    records: tuple[ImageRecord, ...]
    # The whole conversation so far, as in `Prompt.text`; pass the answer as `history` of the next request on
    # the same image.
    transcript: str
    # Seconds by stage, of the whole batch this request was part of.
    seconds: Mapping[str, float]
    # To be shown with every answer.
    notice: str = INTENDED_USE
    # `OpenedImage.identity` of the image it is about.
    image: str | None = None
    # Visual tokens of every image, frame and region in the transcript.
    visual_tokens: tuple[int, ...] | None = None


class OpenedImage:
    """An image, or the frames of a volume: read once, and encoded once for any number of questions."""

    def __init__(
        self,
        frames: Sequence[Image.Image],
        records: Sequence[ImageRecord],
        tiles: UInt8[np.ndarray, "tiles side side 3"],
        conditioning: Sequence[int] | None = None,
    ):
        self.frames = tuple(frames)
        self.records = tuple(records)
        # sha256 of all sizes and pixels, by which the same image opened again is known.
        self.identity = pixel_identity(self.frames)
        # Frames that the language model sees and that are segmented from its words; None for a single image.
        self.conditioning = None if conditioning is None else tuple(conditioning)
        # What the vision model reads.
        self.tiles = tiles
        # Rows for the language model of every tile: an array on the devices, and the place in it; made at the
        # first question.
        self.visual: Sequence[tuple[Float[jax.Array, "tiles grid grid embed"], int]] | None = None
        # SAM2's features of a single image; made at the first `[SEG]`, by one thread at a time.
        self.features: ImageFeatures | None = None
        self.encoding = threading.Lock()

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
    # The answer to the previous question about this image; one about another image is refused.
    history: Answer | None = None
    # Tokens to say at given steps whatever the model prefers: {step: id}.
    forced: Mapping[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OpenedRequest(Request):
    """A request whose image has been read."""

    image: OpenedImage | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn instead of taking the likeliest. The same seed gives the same answer.

    Raises:
        InputError: a number outside its limit.
    """

    # Above 1 the answer is more varied, towards 0 it is the likeliest one.
    temperature: Annotated[float, ABOVE_ZERO] = 1.0
    # Draw only from the likeliest tokens that have this much probability together.
    top_p: Annotated[float, POSITIVE_SHARE] = 1.0
    # In a batch every request is drawn as if it were alone.
    seed: Annotated[int, SEED] = 0

    def __post_init__(self):
        require_limits(self)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request as the model reads it."""

    # One <IMG_CONTEXT> stands for all visual tokens of an image, a frame or a region.
    text: str
    # Each visual token by itself.
    ids: list[int]
    # Visual tokens of every image, frame and region in turn.
    visual_tokens: tuple[int, ...]
    # For every <IMG_CONTEXT> in turn, the row of the image's visual tokens that takes its place.
    rows: Int[np.ndarray, " places"]


def pixel_identity(frames: Sequence[Image.Image]) -> str:
    """sha256 of all sizes and pixels."""
    digest = hashlib.sha256(repr([frame.size for frame in frames]).encode())
    for frame in frames:
        digest.update(np.asarray(frame).tobytes())
    return digest.hexdigest()
