"""Prompts in the exact form the weights know."""

from collections.abc import Sequence

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    REGION_END,
    REGION_START,
    require_text,
)

# Where the image goes in a prompt: plain text, replaced before tokenising.
IMAGE = "<image>"

# The end of a turn: ordinary text for the tokenizer, not a special token. It stays in the answer.
STOP_TEXT = "<|end|>"

# The turn around the user's text. Training left out the newline that inference has, and the released
# weights were evaluated like that, so both forms are kept.
INFERENCE_TURN = "<|user|>\n{input}<|end|>\n<|assistant|>\n"
TRAINING_TURN = "<|user|>\n{input}<|end|><|assistant|>\n"


def frames_block(frames: int) -> str:
    """The text that stands for the frames (of an image, the only one) which the language model sees."""
    return "\n".join([IMAGE_START + IMAGE_CONTEXT + IMAGE_END] * frames)


def regions_block(regions: int) -> str:
    """The text after the image that introduces regions."""
    named = ", ".join(
        f"region{number}{REGION_START}{IMAGE_CONTEXT}{REGION_END}" for number in range(1, regions + 1)
    )
    return f"\nThere are {regions} part regions in the picture: {named}.\n"


def build_prompt(
    text: str,
    *,
    image: bool = False,
    frames: int = 0,
    regions: int = 0,
    past_text: str = "",
    turn: str = INFERENCE_TURN,
) -> str:
    """The string to tokenise for one question; one <IMG_CONTEXT> stands for all of an image, frame or region.

    Tokenised, each of them is to be repeated (`expand`); it never merges with its neighbours. `<image>` in
    the text is replaced by the image's tokens and nothing is inserted around them: write
    "<image>\\nPlease ..." for the form that 2-D training used. Without an image, `<image>` is deleted.

    A further turn on the same image passes the previous prompt + answer as past_text, and no `<image>` of
    its own; image, frames and regions then say what past_text already holds.

    Args:
        text: the question.
        image: whether there is a single image.
        frames: frames of a volume or video that the language model sees; 0 without one.
        regions: regions of the image that the question refers to.
        past_text: earlier turns, in the form of this function's result.
        turn: INFERENCE_TURN or TRAINING_TURN.

    Raises:
        InputError: no valid text, or what is given and what the text refers to do not fit; each case says
            what to change.
    """
    _check_prompt(text, image, frames, regions, past_text)
    block = frames_block(1 if image else frames)
    if regions:
        block += regions_block(regions)
    return past_text + turn.replace("{input}", text.replace(IMAGE, block))


def visual_tokens(
    tiles: int, frames: int, tokens_per_tile: int, cells: Sequence[int] = ()
) -> tuple[int, ...]:
    """How many visual tokens each <IMG_CONTEXT> of `build_prompt` stands for.

    Args:
        tiles: tiles of a single image, thumbnail included; 0 without one.
        frames: frames that the language model sees, one tile each; 0 without them.
        tokens_per_tile: visual tokens a tile.
        cells: visual tokens of each region.
    """
    image = (tiles * tokens_per_tile,) if tiles else (tokens_per_tile,) * frames
    return (*image, *cells)


def expand(ids: Sequence[int], image_context_id: int, counts: Sequence[int]) -> list[int]:
    """The ids of a prompt with each <IMG_CONTEXT> repeated as often as `counts` says, in turn."""
    repeats = iter(counts)
    result: list[int] = []
    for token in ids:
        result += [token] * (next(repeats) if token == image_context_id else 1)
    return result


def _check_prompt(text: str, image: bool, frames: int, regions: int, past_text: str) -> None:
    require_text(text, "The prompt")
    require_text(past_text, "past_text")
    has_image = bool(image or frames)
    if image and frames:
        raise InputError("Both an image and a frame sequence were given; give one of them.")
    if not text.replace(IMAGE, "").strip():
        raise InputError(
            "The prompt is empty; ask something, for example '<image>Please segment the liver.'."
        )
    if text.count(IMAGE) > 1:
        raise InputError(
            f"The prompt has {IMAGE} {text.count(IMAGE)} times; write it once, where the image goes."
        )
    for token in (IMAGE_CONTEXT, IMAGE_START, IMAGE_END):
        if token in text:
            raise InputError(
                f"The prompt contains {token}, which the model reserves for images; write {IMAGE}."
            )
    if IMAGE in past_text:
        raise InputError(
            f"past_text contains {IMAGE}; pass the previous prompt and answer as they were returned."
        )
    if regions and not image:
        raise InputError("Regions were given without an image; give the single image they are drawn on.")
    if not past_text:
        if has_image and IMAGE not in text:
            raise InputError(
                f"An image was given but the prompt has no {IMAGE}; write it where the image goes."
            )
        return
    if has_image and IMAGE in text:
        raise InputError(f"The image belongs to the first turn; leave {IMAGE} out of the later ones.")
    if regions and REGION_START not in past_text:
        raise InputError("Regions cannot be introduced in a later turn; give them with the first one.")
    expected = int(image) + frames + regions
    found = past_text.count(IMAGE_CONTEXT)
    if found and not has_image:
        raise InputError("past_text holds an image but none was given; give the same image again.")
    if found != expected:
        raise InputError(
            f"past_text holds {found} images, frames and regions but {expected} are given; give those that "
            "the earlier turns were about."
        )
