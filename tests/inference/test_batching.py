"""Requests as arrays of fixed shapes: what is where, and what fills them up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from micro_checkpoint import SMALL
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.answer import OpenedImage, OpenedRequest
from unibiomed_jax.inference.batching import (
    frame_arrays,
    prompt_arrays,
    prompt_of,
    tile_arrays,
    volume_arrays,
)
from unibiomed_jax.inputs.tiles import sam_image

SIDE, SIZE = SMALL.vision.image_size, SMALL.sam2.image_size


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8))


def tiles(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (count, SIDE, SIDE, 3), np.uint8)


def about_image(seed: int, count: int, **options) -> OpenedRequest:
    """About an image of `count` tiles."""
    return OpenedRequest("<image>Why?", OpenedImage([picture(seed)], [], tiles(seed, count)), **options)


def about_volume(seed: int, count: int, conditioning=(0,)) -> OpenedRequest:
    frames = [picture(seed + number) for number in range(count)]
    volume = OpenedImage(frames, [], tiles(seed, len(conditioning)), conditioning)
    return OpenedRequest("<image>Why?", volume)


WORDS = OpenedRequest("Why?")


def arrays_of(tokenizer, requests, max_new_tokens=40, config=SMALL):
    prompts = [prompt_of(config, tokenizer, request) for request in requests]
    return prompts, prompt_arrays(config, tokenizer, requests, prompts, max_new_tokens)


def test_prompts_are_padded_and_rows_beyond_the_batch_end_at_once(byte_tokenizer):
    requests = [about_image(0, 5, forced={2: 7, 39: 8, 40: 9}), about_image(1, 1), WORDS]
    prompts, arrays = arrays_of(byte_tokenizer, requests)
    lengths = [len(prompt.ids) for prompt in prompts]
    assert arrays.ids.shape == arrays.source.shape == (4, 64) and arrays.forced.shape == (4, 64)
    assert arrays.lengths.tolist() == [*lengths, 1]
    assert arrays.limits.tokens.tolist() == [40, 40, 40, 1]
    for row, prompt in enumerate(prompts):
        assert arrays.ids[row, : lengths[row]].tolist() == prompt.ids
        assert (arrays.ids[row, lengths[row] :] == byte_tokenizer.pad_id).all()
    # Image tokens are numbered in turn, five tiles of one each.
    for row, count in enumerate((5, 1, 0, 0)):
        assert arrays.source[row][arrays.source[row] >= 0].tolist() == list(range(count))
        assert ((arrays.source[row] >= 0) == (arrays.ids[row] == byte_tokenizer.image_context_id)).all()
    # A step that will not be said is not dictated.
    dictated = {
        (int(row), int(step)): int(arrays.forced[row, step]) for row, step in np.argwhere(arrays.forced >= 0)
    }
    assert dictated == {(0, 2): 7, (0, 39): 8}


def test_an_answer_ends_where_the_context_does(byte_tokenizer):
    language = dataclasses.replace(SMALL.language, max_position_embeddings=50)
    config = dataclasses.replace(SMALL, language=language)
    (prompt,), arrays = arrays_of(byte_tokenizer, [WORDS], config=config)
    (room,) = arrays.limits.tokens.tolist()
    assert room == 50 - len(prompt.ids) < 40 and arrays.forced.shape == (1, 32)
    assert arrays_of(byte_tokenizer, [WORDS], 2, config)[1].limits.tokens.tolist() == [2]
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        arrays_of(byte_tokenizer, [WORDS], 0)
    with pytest.raises(InputError, match="the model's context holds 50; shorten the text"):
        arrays_of(byte_tokenizer, [OpenedRequest("Why?" * 12)], config=config)


def test_tiles_of_a_batch_have_room_for_the_most(byte_tokenizer):
    requests = [about_image(0, 6), about_image(1, 1), WORDS]
    found = tile_arrays(SMALL, requests, 4)
    assert found.shape == (4, 9, SIDE, SIDE, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, :6], requests[0].image.tiles)
    np.testing.assert_array_equal(found[1, :1], requests[1].image.tiles)
    assert not found[0, 6:].any() and not found[1, 1:].any() and not found[2:].any()
    assert tile_arrays(SMALL, [WORDS], 1).shape == (1, 0, SIDE, SIDE, 3)


def test_frames_of_images_of_volumes_and_of_words():
    frames, plan = frame_arrays(SMALL.sam2, [about_image(seed, 1) for seed in range(3)])
    assert frames.shape == (4, 1, SIZE, SIZE, 3) and plan is None
    for seed in range(3):
        np.testing.assert_array_equal(frames[seed, 0], sam_image(picture(seed), SIZE))
    assert not frames[3].any()
    frames, plan = frame_arrays(SMALL.sam2, [WORDS, WORDS])
    assert frames.shape == (2, 0, SIZE, SIZE, 3) and plan is None

    volumes = [about_volume(0, 3), about_volume(10, 3, (2, 1)), about_volume(20, 3)]
    frames, plan = frame_arrays(SMALL.sam2, volumes)
    assert frames.shape == (4, 8, SIZE, SIZE, 3)
    for row, request in enumerate(volumes):
        alone, own = volume_arrays(SMALL.sam2, request.image)
        np.testing.assert_array_equal(frames[row], alone)
        np.testing.assert_array_equal(alone[2], sam_image(request.image.frames[2], SIZE))
        assert not alone[3:].any()
        assert all(np.array_equal(part[row], single) for part, single in zip(plan, own, strict=True))
    # Whatever fills a batch up is a volume, too.
    assert plan.valid[3].sum() == 3


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([about_image(0, 1), WORDS], "ask about each kind by itself"),
        ([WORDS, about_volume(0, 2)], "ask about each kind by itself"),
        ([about_volume(0, 2), about_image(0, 1)], "ask about each kind by itself"),
        ([about_volume(0, 2), about_volume(0, 3)], "need equally many slices"),
    ],
)
def test_one_batch_is_of_one_kind(requests, reason):
    with pytest.raises(InputError, match=reason):
        frame_arrays(SMALL.sam2, requests)
