"""Answers taken apart: what each [SEG] is about, and the text for people."""

import re
from dataclasses import dataclass

from unibiomed_jax.inputs.tokenizer import (
    SEG,
)


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
