"""The recorded questions of the reference (tests/golden), as requests, and its answers."""

from __future__ import annotations

import numpy as np
from PIL import Image
from places import GOLDEN

from unibiomed_jax import Answer, Request, UniBiomed
from unibiomed_jax.inputs.tokenizer import IMAGE_CONTEXT

CASES = ["image_abdomen", "image_noseg", "region_abdomen", "text_only", "video8"]
NEW_TOKENS = 24
# Room for masks in the answers of one compiled call.
OBJECTS = 2


def load(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "micro" / f"{case}.npz") as arrays:
        return dict(arrays)


def golden_mask(golden: dict, number: int) -> np.ndarray:
    shape = golden[f"mask{number}_shape"]
    bits = np.unpackbits(golden[f"mask{number}_bits"])[: np.prod(shape)]
    return bits.reshape(shape).astype(bool)


def request(model: UniBiomed, image: Image.Image, case: str, golden: dict) -> Request:
    steps, tokens = (golden[name].astype(int).tolist() for name in ("forced_steps", "forced_ids"))
    forced = dict(zip(steps, tokens, strict=True))
    if case == "image_abdomen":
        question = (
            "<image>Could you describe the abnormality in this image? Please highlight the region with "
            "interleaved segmentation masks."
        )
        return Request(question, image, forced=forced)
    if case == "image_noseg":
        return Request("<image>Describe this image.", image.crop((0, 0, 410, 200)), forced=forced)
    if case == "region_abdomen":
        rectangle = np.zeros((410, 410))
        rectangle[82:184, 123:246] = 1
        rows, columns = np.mgrid[:410, :410]
        disc = (rows - 287) ** 2 + (columns - 205) ** 2 < 61.5**2
        question = "<image>\nWhat is the region1 in the picture? Is region2 normal?"
        return Request(question, image, regions=[rectangle, disc], forced=forced)
    if case == "text_only":
        past = "<|user|>\nHello!<|end|>\n<|assistant|>\nHi.<|end|>\n"
        history = Answer("Hello!", "Hi.<|end|>", (), (), past, {})
        return Request("<image>What is a CT scan?", history=history, forced=forced)
    frames = [image.convert("RGB").crop((10 * i, 12 * i, 10 * i + 320, 12 * i + 240)) for i in range(8)]
    return Request("<image>Please segment the liver in this video.", model.open_volume(frames), forced=forced)


def written_out(answer: Answer) -> str:
    """The conversation as the reference has it, with every image token in its text."""
    first, *others = answer.transcript.split(IMAGE_CONTEXT)
    places = zip(answer.visual_tokens, others, strict=True)
    return first + "".join(IMAGE_CONTEXT * count + part for count, part in places)


def assert_masks_equal(answer: Answer, golden: dict) -> None:
    """The masks of the reference, but where a logit is so near to 0 that rounding decides."""
    assert len(answer.segments) == int(golden["n_masks"])
    for number, segment in enumerate(answer.segments):
        expected = golden_mask(golden, number)
        assert np.array_equal(segment.mask, segment.logits > 0)
        differs = segment.mask.reshape(expected.shape) != expected
        assert not differs.any() or np.abs(segment.logits.reshape(expected.shape)[differs]).max() < 1e-3
