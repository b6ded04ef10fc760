"""Prompts in the exact form the weights know, and answers taken apart again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.tokenizer import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    REGION_END,
    REGION_START,
    SEG,
    Tokenizer,
)

# Where the image goes in a prompt: plain text, replaced before tokenising.
IMAGE = "<image>"
# The end of a turn: ordinary text for the tokenizer, not a special token. It stays in the answer.
STOP_TEXT = "<|end|>"

# The turn around the user's text. Training left out the newline that inference has, and the released
# weights were evaluated like that, so both forms are kept.
INFERENCE_TURN = "<|user|>\n{input}<|end|>\n<|assistant|>\n"
TRAINING_TURN = "<|user|>\n{input}<|end|><|assistant|>\n"


# ------------------------------------------------------------------------------------------------------------
# Prompts


def image_block(tiles: int, tokens_per_tile: int) -> str:
    """The text that stands for one image."""
    return IMAGE_START + IMAGE_CONTEXT * (tiles * tokens_per_tile) + IMAGE_END


def frames_block(frames: int, tokens_per_tile: int) -> str:
    """The text that stands for the frames which the language model sees."""
    return "\n".join([image_block(1, tokens_per_tile)] * frames)


def region_block(cells: Sequence[int]) -> str:
    """The text after the image that introduces regions: cells[i] visual tokens of the last tile for one."""
    regions = ", ".join(
        f"region{number}{REGION_START}{IMAGE_CONTEXT * count}{REGION_END}"
        for number, count in enumerate(cells, 1)
    )
    return f"\nThere are {len(cells)} part regions in the picture: {regions}.\n"


def build_prompt(
    text: str,
    *,
    tiles: int = 0,
    frames: int = 0,
    tokens_per_tile: int = 256,
    region_cells: Sequence[int] = (),
    past_text: str = "",
    turn: str = INFERENCE_TURN,
) -> str:
    """The string to tokenise for one question.

    `<image>` in the text is replaced by the image's tokens and nothing is inserted around them: write
    "<image>\\nPlease ..." for the form that 2-D training used. Without an image, `<image>` is deleted.

    A further turn on the same image passes the previous prompt + answer as past_text, and no `<image>` of
    its own; tiles and region_cells then say what past_text already holds.

    Args:
        text: the question.
        tiles: tiles of the image, thumbnail included; 0 without an image.
        frames: frames of a volume or video that the language model sees; 0 without one.
        tokens_per_tile: visual tokens a tile.
        region_cells: for each region, its number of visual tokens.
        past_text: earlier turns, with their image tokens written out.
        turn: INFERENCE_TURN or TRAINING_TURN.

    Raises:
        InputError: what is given and what the text refers to do not fit; each case says what to change.
    """
    _check_prompt(text, tiles, frames, tokens_per_tile, region_cells, past_text)
    block = ""
    if tiles:
        block = image_block(tiles, tokens_per_tile)
    elif frames:
        block = frames_block(frames, tokens_per_tile)
    if region_cells:
        block += region_block(region_cells)
    return past_text + turn.replace("{input}", text.replace(IMAGE, block))


def _check_prompt(
    text: str, tiles: int, frames: int, tokens_per_tile: int, region_cells: Sequence[int], past_text: str
) -> None:
    has_image = bool(tiles or frames)
    if tiles and frames:
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
            f"past_text contains {IMAGE}; pass the previous prompt and answer as they were returned, with "
            "the image tokens written out."
        )
    if region_cells and not tiles:
        raise InputError("Regions were given without an image; give the single image they are drawn on.")
    if not past_text:
        if has_image and IMAGE not in text:
            raise InputError(
                f"An image was given but the prompt has no {IMAGE}; write it where the image goes."
            )
        return
    if has_image and IMAGE in text:
        raise InputError(f"The image belongs to the first turn; leave {IMAGE} out of the later ones.")
    if region_cells and REGION_START not in past_text:
        raise InputError("Regions cannot be introduced in a later turn; give them with the first one.")
    expected = (tiles + frames) * tokens_per_tile + sum(region_cells)
    found = past_text.count(IMAGE_CONTEXT)
    if found and not has_image:
        raise InputError("past_text holds an image but none was given; give the same image again.")
    if found != expected:
        raise InputError(
            f"past_text holds {found} image tokens but the given image and regions make {expected}; give "
            "those that the earlier turns were about."
        )


# ------------------------------------------------------------------------------------------------------------
# Answers


def find_stop(tokenizer: Tokenizer, ids: Sequence[int], start: int = 0) -> int | None:
    """How many of the generated ids the reference would have generated, or None if it would go on.

    It stops after the id that is eos_id, or that makes the whole decoded text, without carriage returns and
    newlines, end with `<|end|>`. Only a tail is decoded: bytes before it cannot change what the text ends
    with, since `<|end|>` is ASCII.

    Args:
        tokenizer: the model's.
        ids: generated so far.
        start: ids[:start] are known not to stop, so that a loop of blocks looks at each id once.
    """
    for end in range(start + 1, len(ids) + 1):
        if ids[end - 1] == tokenizer.eos_id:
            return end
        width = len(STOP_TEXT)
        while True:
            tail = tokenizer.decode(ids[max(0, end - width) : end]).replace("\r", "").replace("\n", "")
            if len(tail) >= len(STOP_TEXT) or width >= end:
                break
            width *= 2
        if tail.endswith(STOP_TEXT):
            return end
    return None


@dataclass(frozen=True)
class Phrase:
    """What one `[SEG]` of an answer is about."""

    # The words, without special tokens; empty if neither the answer nor the question has any.
    text: str
    # Whether the model marked the phrase itself, with <p> and </p>.
    marked: bool
    # Where this [SEG] begins in the answer.
    position: int


# Answers of the training data that name nothing by themselves; the target is then in the next sentence or
# the question.
_CARRIER = re.compile(r"(sure,?)?\s*((it is|the segmentation result is)[:,]?)?\s*", re.IGNORECASE)
_MARKED = re.compile(r"<p>((?:(?!</?p>).)*)</p>", re.DOTALL)
# Only these between two [SEG]: both belong to the same phrase.
_SEPARATOR = re.compile(r"(\s|,|;|&|\band\b)*", re.IGNORECASE)
# Sentences end at a full stop before a space, so that "2.5 cm" stays whole.
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$|<)|\n")
_MARKUP = re.compile(r"</?p>|</?vp>|\[SEG\]|<\|[a-z_]*\|>|<image>|</?img>|<IMG_CONTEXT>")
# The questions for one target, as the training data ask them.
_TARGETS = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"(?:could you provide|can you provide) a segmentation mask for (?:the )?(.+?)[.?]*",
        r"(?:can you |could you |please )?(?:identify and )?segment (?:the )?(.+?)"
        r"(?: in this (?:image|video|volume))?[.?]*",
        r"can you highlight (?:the )?(.+?) ?with a segmentation mask[.?]*",
        r"(?:what|where) (?:is|are) (?:the )?(.+?)\? please (?:respond with|output) (?:a )?"
        r"segmentation masks?[.?]*",
    )
]


def parse_answer(answer: str, question: str = "") -> list[Phrase]:
    """The phrase of every `[SEG]` in an answer, in order.

    The words inside the last `<p>...</p>` between the previous `[SEG]` and this one; several `[SEG]` in a
    row share them. Without such a mark, the sentence around the `[SEG]`. Where that names nothing ("Sure,
    it is [SEG]."), the next sentence if no other `[SEG]` claims it ("[SEG]. lung tumor in chest ct."), else
    what the question asked for.
    """
    phrases: list[Phrase] = []
    ends = [match.end() for match in re.finditer(re.escape(SEG), answer)]
    previous = 0
    for number, end in enumerate(ends):
        start = end - len(SEG)
        before = answer[previous:start]
        marked = _MARKED.findall(before)
        if marked:
            phrases.append(Phrase(_words(marked[-1]), True, start))
        elif phrases and _SEPARATOR.fullmatch(before):
            phrases.append(Phrase(phrases[-1].text, phrases[-1].marked, start))
        else:
            following = ends[number + 1] - len(SEG) if number + 1 < len(ends) else len(answer)
            phrases.append(Phrase(_sentence(answer, previous, start, end, following, question), False, start))
        previous = end
    return phrases


def _sentence(answer: str, previous: int, start: int, end: int, following: int, question: str) -> str:
    breaks = [match.end() for match in _SENTENCE_END.finditer(answer, previous, start)]
    left = breaks[-1] if breaks else previous
    stop = _SENTENCE_END.search(answer, end, following)
    right = stop.start() if stop else end if following < len(answer) else following
    sentence = _words(answer[left:start] + " " + answer[end:right])
    if not _CARRIER.fullmatch(sentence):
        return sentence
    if stop:
        after = _SENTENCE_END.search(answer, stop.end(), following)
        claimed = following < len(answer) and after is None
        next_sentence = _words(answer[stop.end() : after.start() if after else following])
        if next_sentence and not claimed:
            return next_sentence
    return requested_target(question) or sentence


def requested_target(question: str) -> str:
    """What a question asks to segment ("Please segment the liver." -> "liver"), else the question itself."""
    question = _words(question)
    for pattern in _TARGETS:
        match = pattern.fullmatch(question)
        if match:
            return match.group(1)
    return question


def clean_answer(answer: str) -> str:
    """An answer for people: without the marks of phrases and turns, `[SEG]` kept."""
    return _tidy(answer.replace(SEG, "\0")).replace("\0", SEG)


def _words(text: str) -> str:
    return _tidy(text).strip(" .,;:")


def _tidy(text: str) -> str:
    """Text without markup, whitespace collapsed, no space before punctuation."""
    text = " ".join(_MARKUP.sub(" ", text).split())
    return re.sub(r"\s+([.,;:!?])", r"\1", text)
