"""Whether an answer to a question is right, under rules that others publish numbers with.

Numbers of different rules cannot be compared: that a closed question is answered rightly means equality to
one, a word somewhere in the answer to another. Each rule is re-expressed from what its code does (versions:
MedPLIB 5ab54bc, LLaVA-Med ad758b6, MedEvalKit 9b12e3b, lmms-eval 75571cf).
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from unibiomed_jax.evaluation.readers.questions import CLOSED, LETTERS
from unibiomed_jax.evaluation.records import Sample

Scores = dict[str, float]


def score_answer(sample: Sample, rules: Sequence[str]) -> Scores:
    """The scores of a record that says whether its question is closed or open, or has choices.

    Names are `RULE_SCORE`; `choice_accuracy` has one rule alone.
    """
    said = sample.prediction or ""
    assert sample.answer is not None
    if sample.choices:
        return {"choice_accuracy": float(choose(said, sample.choices) == sample.answer)}
    if "answer_type" not in sample.groups:
        return {}
    closed = sample.groups["answer_type"] == CLOSED
    return {
        f"{rule}_{name}": float(value)
        for rule in rules
        for name, value in RULES[rule](sample.answer, said, closed).items()
    }


# "b", "(b) MRI", "b. MRI", "Option B"; not the article of "a mass".
_LETTER = re.compile(r"\W*(?:option\s+)?([a-z])(?:[).:\]]|\W*$)")
# "The correct option is (B)."
_OPTION = re.compile(r".*\boption\s+(?:is\s+)?\W?([a-z])\b")


def choose(said: str, choices: Sequence[str]) -> str:
    """The choice that is meant: by its whole text, by letter, by text up to a full stop, or else the most
    similar one; of no words none.
    """
    words = said.lower().replace("\n", "").split("answer is")[-1].split("answer:")[-1].strip()
    if not re.search(r"\w", words):
        return ""
    first = words.split(".")[0].split(":")[-1].strip()
    letters = LETTERS[: len(choices)].lower()
    lowered = [choice.lower().strip() for choice in choices]
    bare = [choice.rstrip(".") for choice in lowered]
    if words.rstrip(".") in bare:  # "C. difficile" is no letter
        return choices[bare.index(words.rstrip("."))]
    for letter in (_LETTER.match(words), _LETTER.match(first), _OPTION.match(words)):
        if letter and letter[1] in letters:
            return choices[letters.index(letter[1])]
    if first in bare:
        return choices[bare.index(first)]
    likeness = [difflib.SequenceMatcher(None, choice, words).ratio() for choice in lowered]
    return choices[likeness.index(max(likeness))]


# ------------------------------------------------------------------------------- MedPLIB and LLaVA-Med

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_SEPARATORS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# Of a text, as its code takes a flag for a count.
_FULL_STOPS = 32


def normalise(text: str) -> str:
    """A text without case, articles and separators, with numbers in digits (VQA's usual way).

    Its table that puts apostrophes into "dont" is left out: it changes both sides alike.
    """
    text = text.lower()
    kept = text
    for mark in _SEPARATORS:
        gone = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        kept = kept.replace(mark, "" if gone else " ")
    words = (_DIGITS.get(word, word) for word in _FULL_STOP.sub("", kept, count=_FULL_STOPS).split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _overlap(truth: str, said: str) -> Scores:
    """Of normalised words: each that is found counts as often as it is said."""
    truths, saids = Counter(truth.split()), Counter(said.split())
    common = sum(count for word, count in saids.items() if word in truths)
    missed = sum(count for word, count in truths.items() if word not in saids)
    if not common:
        return {"precision": 0, "recall": 0, "f1": 0}
    precision, recall = common / saids.total(), common / (common + missed)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


def medplib(truth: str, said: str, closed: bool) -> Scores:
    """Closed: equal when normalised. Open: true words that were said, divided by all that were said."""
    truth, said = normalise(truth), normalise(said)
    if closed:
        return {"closed_accuracy": truth == said}
    found = sum(word in said.split() for word in set(truth.split()))
    return {"open_accuracy": found / max(len(said.split()), 1), **_overlap(truth, said)}


def llava_med(truth: str, said: str, closed: bool) -> Scores:
    """Closed: with yes or no in an answer the truth is looked for in it, and if it is not there the question
    is left out, which flatters; without them the answer is wrong. Open: overlap of words, of which its paper
    takes the recall.
    """
    truth, said = normalise(truth), normalise(said)
    if not closed:
        return _overlap(truth, said)
    if "yes" not in said and "no" not in said:
        return {"closed_accuracy": 0}
    return {"closed_accuracy": 1} if truth in said else {}


# ------------------------------------------------------------------------------------------ MedEvalKit


def medevalkit(truth: str, said: str, closed: bool) -> Scores:
    """Closed: yes or no, whichever alone is somewhere in the answer; other words equal. Open: equal, and
    overlap of the sets of words. (The columns of its own tables are rotated: what it calls F1 is recall.)
    """
    truth, said = truth.lower().strip(), said.lower().strip()
    for lead in ("answer is", "answer:"):
        said = said.split(lead)[-1]
    if closed:
        plain = said.replace("\n", "").replace(".", "")
        if truth not in ("yes", "no"):
            return {"closed_accuracy": plain == truth}
        return {"closed_accuracy": ("yes" in plain) != ("no" in plain) and truth in plain}
    truths, saids = set(truth.split()), set(said.split())
    common = len(truths & saids)
    precision, recall = common / max(len(saids), 1), common / max(len(truths), 1)
    f1 = 2 * precision * recall / (precision + recall) if common else 0
    return {"open_accuracy": truth == said, "precision": precision, "recall": recall, "f1": f1}


# ------------------------------------------------------------------------------------------- lmms-eval

_BRACKETS = re.compile(r"\([^)]*\)|（[^）]*）")
_PUNCTUATION = str.maketrans(
    dict.fromkeys(
        string.punctuation + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、《》？【】",
        " ",
    )
)
_YES = set("yes yeah yep true 是 是的 有 包含 可以 能 会 正常".split())
_NO = set("no nope false 否 不是 没有 无 不包含 不能 不会 不可以 不正常 异常".split())


def _short(text: str) -> str:
    text = " ".join(_BRACKETS.sub(" ", text.strip().lower()).translate(_PUNCTUATION).split())
    if text == "x ray":
        return "xray"
    return "yes" if text in _YES else "no" if text in _NO else text


def lmms_eval(truth: str, said: str, closed: bool) -> Scores:
    """Equal without case, punctuation and what is in brackets; closed and open questions alike."""
    return {f"{'closed' if closed else 'open'}_accuracy": _short(truth) == _short(said)}


RULES: dict[str, Callable[[str, str, bool], Scores]] = {
    "medplib": medplib,
    "llava-med": llava_med,
    "medevalkit": medevalkit,
    "lmms-eval": lmms_eval,
}
