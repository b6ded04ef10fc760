"""Prompts in the form the weights know: their text, their ids, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.prompt import TRAINING_TURN, build_prompt, expand, visual_tokens
from unibiomed_jax.inputs.tokenizer import IMAGE_CONTEXT

TRAINING_IDS = [
    27, 91, 872, 91, 397, 151665, 151667, 151666, 198, 5501, 10238, 25506, 304, 63672, 18572, 15757, 91,
    408, 91, 1784, 91, 77091, 91, 397,
]  # fmt: skip
INFERENCE_IDS = [
    27, 91, 872, 91, 397, 151665, 151667, 151666, 5501, 10238, 25506, 304, 63672, 18572, 15757, 91, 408, 91,
    397, 27, 91, 77091, 91, 397,
]  # fmt: skip

TOKENS_PER_TILE = 16
# What each recorded prompt was built from: arguments of `build_prompt`, and of `visual_tokens`.
CASES = {
    "image_abdomen": (
        {
            "text": "<image>Could you describe the abnormality in this image? "
            "Please highlight the region with interleaved segmentation masks.",
            "image": True,
        },
        {"tiles": 10},
    ),
    "image_noseg": ({"text": "<image>Describe this image.", "image": True}, {"tiles": 9}),
    "region_abdomen": (
        {
            "text": "<image>\nWhat is the region1 in the picture? Is region2 normal?",
            "image": True,
            "regions": 2,
        },
        {"tiles": 10, "cells": [1, 1]},
    ),
    "video8": ({"text": "<image>Please segment the liver in this video.", "frames": 5}, {"frames": 5}),
    "text_only": (
        {
            "text": "<image>What is a CT scan?",
            "past_text": "<|user|>\nHello!<|end|>\n<|assistant|>\nHi.<|end|>\n",
        },
        {},
    ),
}


def count_visual(tiles: int = 0, frames: int = 0, cells: list[int] | tuple[int, ...] = ()) -> tuple[int, ...]:
    return visual_tokens(tiles, frames, TOKENS_PER_TILE, cells)


def written_out(prompt: str, counts: tuple[int, ...]) -> str:
    """The prompt as the reference has it, with every image token in its text."""
    first, *others = prompt.split(IMAGE_CONTEXT)
    return first + "".join(IMAGE_CONTEXT * n + part for n, part in zip(counts, others, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_prompt_equals_the_recorded_one(byte_tokenizer, case):
    recorded = np.load(GOLDEN / "micro" / f"{case}.npz")
    arguments, shown = CASES[case]
    prompt, counts = build_prompt(**arguments), count_visual(**shown)
    assert written_out(prompt, counts) == str(recorded["input_text"])
    ids = expand(byte_tokenizer.encode(prompt), byte_tokenizer.image_context_id, counts)
    assert ids == recorded["input_ids"].tolist()
    assert byte_tokenizer.decode(recorded["generated_ids"]).strip() == str(recorded["prediction"])


def test_prompt_ids_of_the_real_vocabulary(qwen2):
    question = "Please segment liver in abdomen CT."
    training = build_prompt(f"<image>\n{question}", image=True, turn=TRAINING_TURN)
    assert qwen2.encode(training) == TRAINING_IDS
    assert qwen2.encode(build_prompt(f"<image>{question}", image=True)) == INFERENCE_IDS


def test_later_turn(byte_tokenizer):
    first = build_prompt("<image>Is there a tumor?", image=True)
    past = first + "Yes.<|end|>"
    second = build_prompt("Where?", image=True, past_text=past)
    assert second == past + "<|user|>\nWhere?<|end|>\n<|assistant|>\n"
    image_id = byte_tokenizer.image_context_id
    assert expand(byte_tokenizer.encode(second), image_id, count_visual(tiles=3)).count(image_id) == 48


def test_later_turn_after_regions(byte_tokenizer):
    first = build_prompt("<image>\nCompare.", image=True, regions=2)
    second = build_prompt("Why?", image=True, regions=2, past_text=first + "Same.<|end|>")
    assert second.count(IMAGE_CONTEXT) == 3
    image_id = byte_tokenizer.image_context_id
    counts = count_visual(tiles=1, cells=[2, 3])
    assert expand(byte_tokenizer.encode(second), image_id, counts).count(image_id) == 21


# ------------------------------------------------------------------------------------------------------------
# image tokens, counted and written out


@pytest.mark.parametrize(
    ("shown", "counts"),
    [
        ({}, ()),
        ({"tiles": 1}, (16,)),
        ({"tiles": 13}, (208,)),
        ({"tiles": 10, "cells": [3, 1, 4]}, (160, 3, 1, 4)),
        ({"frames": 5}, (16, 16, 16, 16, 16)),
    ],
)
def test_visual_tokens_of_an_image_of_each_frame_and_of_each_region(shown, counts):
    assert count_visual(**shown) == counts


# Ids that are no image token, then how often the image token after them is to be repeated.
pieces_of_prompts = st.lists(
    st.tuples(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 9)), max_size=6
)


@given(pieces_of_prompts, st.lists(st.integers(0, 6), max_size=4))
def test_expand_repeats_each_image_token_by_its_own_count(pieces, last):
    short = [token for others, _ in pieces for token in [*others, 7]] + last
    counts = [count for _, count in pieces]
    full = [token for others, count in pieces for token in [*others, *[7] * count]] + last
    assert expand(short, 7, counts) == full
    assert expand(short, 7, [1] * len(counts)) == short


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1).filter(
    str.strip
)
cells_of_regions = st.lists(st.integers(1, 16), max_size=4)


@given(plain_text, plain_text, st.integers(1, 13), cells_of_regions)
@settings(max_examples=50)
def test_number_of_image_tokens(byte_tokenizer, before, after, tiles, cells):
    prompt = build_prompt(before + "<image>" + after, image=True, regions=len(cells))
    assert prompt.startswith("<|user|>\n" + before) and prompt.endswith(after + "<|end|>\n<|assistant|>\n")
    image_id = byte_tokenizer.image_context_id
    ids = expand(byte_tokenizer.encode(prompt), image_id, count_visual(tiles=tiles, cells=cells))
    assert ids.count(image_id) == 16 * tiles + sum(cells)


@given(plain_text, st.integers(1, 8))
@settings(max_examples=50)
def test_number_of_frame_tokens(byte_tokenizer, text, frames):
    prompt = build_prompt("<image>" + text, frames=frames)
    image_id = byte_tokenizer.image_context_id
    ids = expand(byte_tokenizer.encode(prompt), image_id, count_visual(frames=frames))
    assert ids.count(image_id) == 16 * frames
    assert prompt.count("</img>\n<img>") == frames - 1


@given(plain_text, plain_text, st.integers(0, 3), cells_of_regions)
@settings(max_examples=50)
def test_ids_repeated_are_those_of_the_text_written_out(byte_tokenizer, qwen2, before, after, frames, cells):
    """An image token never merges with its neighbours, whatever the words around it are."""
    if frames:
        prompt, counts = build_prompt(before + "<image>" + after, frames=frames), count_visual(frames=frames)
    else:
        prompt = build_prompt(before + "<image>" + after, image=True, regions=len(cells))
        counts = count_visual(tiles=2, cells=cells)
    for tokenizer in (byte_tokenizer, qwen2):
        ids = expand(tokenizer.encode(prompt), tokenizer.image_context_id, counts)
        assert ids == tokenizer.encode(written_out(prompt, counts))


# ------------------------------------------------------------------------------------------------------------
# what is refused

PAST = "<|user|>\n<img>" + IMAGE_CONTEXT + "</img>Hello<|end|>\n<|assistant|>\nHi.<|end|>"
PAST_OF_REGIONS = build_prompt("<image>Compare.", image=True, regions=2) + "Same.<|end|>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "The prompt is empty"),
        ({"text": " \n"}, "The prompt is empty"),
        ({"text": "<image>\n", "image": True}, "The prompt is empty"),
        ({"text": "<image>a<image>", "image": True}, "has <image> 2 times"),
        ({"text": "<image>a<image>"}, "has <image> 2 times"),
        ({"text": "a", "image": True}, "has no <image>"),
        ({"text": "a", "frames": 2}, "has no <image>"),
        ({"text": "<image>a", "image": True, "frames": 2}, "Both an image and a frame sequence"),
        ({"text": "<image>a <IMG_CONTEXT>", "image": True}, "contains <IMG_CONTEXT>"),
        ({"text": "<image>a </img>", "image": True}, "contains </img>"),
        ({"text": "a", "past_text": "<image>b"}, "past_text contains <image>"),
        ({"text": "a", "image": True, "past_text": "<image>b"}, "past_text contains <image>"),
        ({"text": "<image>a", "image": True, "past_text": PAST}, "belongs to the first turn"),
        ({"text": "a", "past_text": PAST}, "give the same image again"),
        ({"text": "a", "frames": 2, "past_text": PAST}, "holds 1 images, frames and regions but 2 are given"),
        ({"text": "a", "image": True, "past_text": "Hello"}, "holds 0 images, .* but 1 are given"),
        ({"text": "a", "image": True, "past_text": PAST_OF_REGIONS}, "holds 3 images, .* but 1 are given"),
        (
            {"text": "a", "image": True, "past_text": PAST_OF_REGIONS, "regions": 1},
            "holds 3 images, .* but 2 are given",
        ),
        ({"text": "a", "image": True, "past_text": PAST, "regions": 1}, "introduced in a later turn"),
        ({"text": "<image>a", "regions": 1}, "without an image"),
        ({"text": "<image>a", "frames": 2, "regions": 1}, "without an image"),
    ],
)
def test_unusable_prompts(arguments, message):
    with pytest.raises(InputError, match=message):
        build_prompt(**arguments)
