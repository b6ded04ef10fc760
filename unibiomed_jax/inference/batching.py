"""Requests as the model reads them: written out, and as arrays of fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from unibiomed_jax.config.model import ModelConfig, Sam2Config
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.answer import OpenedImage, OpenedRequest, Prompt
from unibiomed_jax.inference.buckets import frame_bucket, power_of_two, tile_bucket, token_bucket
from unibiomed_jax.inference.generate import Limits
from unibiomed_jax.inputs.prompt import build_prompt, expand, visual_tokens
from unibiomed_jax.inputs.regions import box_masks, region_cells
from unibiomed_jax.inputs.tiles import sam_image
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.models.sam2 import FramePlan, plan_frames

# More [SEG] than an answer can have.
NO_LIMIT = 2**30


class PromptArrays(NamedTuple):
    """Prompts of a batch; rows beyond it are one token long and end at once."""

    ids: Int32[np.ndarray, "rows length"]
    # For every visual token the row of its image's tiles that takes its place; -1 elsewhere.
    source: Int32[np.ndarray, "rows length"]
    lengths: Int32[np.ndarray, " rows"]
    # Tokens to say whatever the model prefers; -1 leaves the choice to the model.
    forced: Int32[np.ndarray, "rows new"]
    # Where a row ends at the latest.
    limits: Limits


def prompt_of(config: ModelConfig, tokenizer: Tokenizer, request: OpenedRequest) -> Prompt:
    """Write a request on an opened image out as the model reads it.

    Raises:
        InputError: the prompt, the image, the regions and the history do not fit together.
    """
    image, history = request.image, request.history
    is_volume = image is not None and image.is_volume
    cells = None
    if len(request.regions) or len(request.boxes):
        if image is None or is_volume:
            raise InputError("Regions and boxes need a single image; give the image they are drawn on.")
        boxes = box_masks(request.boxes, image.size) if len(request.boxes) else ()
        cells = region_cells([*request.regions, *boxes], image.size, config.token_grid)
    if image and history and history.image not in (None, image.identity):
        raise InputError(
            "The history is about another image than the one given; give that image again, or leave out "
            "the history."
        )
    tiles = 0 if image is None else len(image.tiles)
    text = build_prompt(
        request.prompt,
        image=tiles > 0 and not is_volume,
        frames=tiles if is_volume else 0,
        regions=0 if cells is None else len(cells),
        past_text="" if history is None else history.transcript,
    )
    counts = visual_tokens(
        0 if is_volume else tiles,
        tiles if is_volume else 0,
        config.tokens_per_tile,
        () if cells is None else [int(cell.sum()) for cell in cells],
    )
    if history is not None and history.visual_tokens not in (None, counts):
        raise InputError(
            "The history is about other regions than those given; give the regions of its first question "
            "again."
        )
    rows = np.arange(tiles * config.tokens_per_tile)
    if cells is not None:  # a region's tokens repeat those of the last tile that lie in it
        last_tile = rows[-config.tokens_per_tile :]
        rows = np.concatenate([rows, *(last_tile[cell.reshape(-1)] for cell in cells)])
    ids = expand(tokenizer.encode(text), tokenizer.image_context_id, counts)
    context = config.language.max_position_embeddings
    if len(ids) >= context:
        raise InputError(
            f"The prompt has {len(ids)} tokens but the model's context holds {context}; shorten the "
            "text, or lower max_tiles in the checkpoint's config.json."
        )
    return Prompt(text, ids, counts, rows)


def prompt_arrays(
    config: ModelConfig,
    tokenizer: Tokenizer,
    requests: Sequence[OpenedRequest],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    max_masks: int | None = None,
) -> PromptArrays:
    """A batch of prompts; each may be answered to where its own context ends.

    Raises:
        InputError: no token, or no mask, may be said.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; at least one token must be generated.")
    if max_masks is not None and max_masks < 1:
        raise InputError(f"max_masks is {max_masks}; give at least 1, or leave it out.")
    batch = len(prompts)
    lengths = np.array([len(prompt.ids) for prompt in prompts], np.int32)
    context = config.language.max_position_embeddings
    tokens = np.minimum(min(max_new_tokens, context), context - lengths)
    rows, length = power_of_two(batch), token_bucket(int(lengths.max()))
    lengths = np.pad(lengths, (0, rows - batch), constant_values=1)
    ids = np.full((rows, length), tokenizer.pad_id, np.int32)
    source = np.full((rows, length), -1, np.int32)
    forced = np.full((rows, token_bucket(int(tokens.max()))), -1, np.int32)
    for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        ids[row, : lengths[row]] = prompt.ids
        if request.image is not None:
            source[row, ids[row] == tokenizer.image_context_id] = prompt.rows
        for step, token in request.forced.items():
            if step < tokens[row]:
                forced[row, step] = token
    # Rows beyond the batch are done with their first token.
    tokens = np.pad(tokens, (0, rows - batch), constant_values=1).astype(np.int32)
    segs = np.full(rows, NO_LIMIT if max_masks is None else min(max_masks, NO_LIMIT), np.int32)
    return PromptArrays(ids, source, lengths, forced, Limits(tokens, segs))


def frame_arrays(
    config: Sam2Config, requests: Sequence[OpenedRequest]
) -> tuple[UInt8[np.ndarray, "rows frames size size 3"], FramePlan | None]:
    """What SAM2 sees of a batch of one kind, and of volumes the order in which it does.

    Raises:
        InputError: requests about images, volumes and words in one batch, or volumes of several lengths.
    """
    images = [request.image for request in requests if request.image is not None]
    if len(images) not in (0, len(requests)) or len({image.is_volume for image in images}) > 1:
        raise InputError(
            "One call grounds images, or volumes, or words alone; ask about each kind by itself."
        )
    size, rows = config.image_size, power_of_two(len(requests))
    if not images:
        return np.zeros((rows, 0, size, size, 3), np.uint8), None
    if not images[0].is_volume:
        frames = np.zeros((rows, 1, size, size, 3), np.uint8)
        for row, image in enumerate(images):
            frames[row, 0] = sam_image(image.frames[0], size)
        return frames, None
    if len({len(image.frames) for image in images}) > 1:
        raise InputError("Volumes that are grounded in one call need equally many slices.")
    volumes = [volume_arrays(config, image) for image in images]
    volumes += volumes[:1] * (rows - len(volumes))
    plans = zip(*(plan for _, plan in volumes), strict=True)
    return np.stack([frames for frames, _ in volumes]), FramePlan(*map(np.stack, plans))


def volume_arrays(
    config: Sam2Config, volume: OpenedImage
) -> tuple[UInt8[np.ndarray, "frames size size 3"], FramePlan]:
    """What SAM2 sees of a volume, filled up with black frames, and the order in which it does."""
    count, size = len(volume.frames), config.image_size
    frames = np.zeros((frame_bucket(count), size, size, 3), np.uint8)
    for number, frame in enumerate(volume.frames):
        frames[number] = sam_image(frame, size)
    return frames, plan_frames(count, config, volume.conditioning, padded_to=len(frames))


def tile_arrays(
    config: ModelConfig, requests: Sequence[OpenedRequest], rows: int
) -> UInt8[np.ndarray, "rows tiles side side 3"]:
    """What the language model sees of a batch."""
    shown = [request.image.tiles if request.image else () for request in requests]
    side = config.vision.image_size
    tiles = np.zeros((rows, tile_bucket(max(map(len, shown))), side, side, 3), np.uint8)
    for row, found in enumerate(shown):
        tiles[row, : len(found)] = found if len(found) else 0
    return tiles
