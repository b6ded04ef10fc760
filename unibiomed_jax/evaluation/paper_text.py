"""Answers in words by the paper's protocol: how UniBiomed's scripts clean them and when they are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from unibiomed_jax.evaluation.repairs import Repairs

_TAG = re.compile("<.*?>")  # does not go over the end of a line
_PHRASE = re.compile("<p>(.*?)</p>")
_PER_COUNT = 1e-6
# Besides "\n", at these the reference's tokeniser begins a new text, which shifts all texts after it.
LINE_SEPARATORS = re.compile("[\r\x0b\x0c\x85\u2028\u2029]")


@dataclass(frozen=True)
class TextItem:
    """What should be said and what was said about one image."""

    name: str
    truth: str
    predicted: str


def clean_disease(answer: str) -> tuple[str, list[str]]:
    """Caption and phrases that demo_disease keeps of a model's answer."""
    caption = _TAG.sub("", _without_newlines(answer)).split("[SEG]. ")[-1]
    return caption, [caption]


def clean_grounded(answer: str) -> tuple[str, list[str]]:
    """Caption and phrases that demo_GVQA, demo_GRG and demo_Medtrinity keep of a model's answer."""
    answer = _without_newlines(answer)
    return _plain(answer), [phrase.strip() for phrase in _PHRASE.findall(answer)]


def clean_region(answer: str) -> str:
    """Target and modality, "kidney in CT", that demo_RegionCap keeps of a model's answer."""
    return shorten(_plain(answer.split("ASSISTANT: ")[-1]))


def _without_newlines(answer: str) -> str:
    return answer.replace("<s>", "").replace("\n", "").replace("  ", " ").split("ASSISTANT: ")[-1]


def _plain(answer: str) -> str:
    return " ".join(_TAG.sub("", answer).replace("[SEG]", "").split()).strip("'").strip()


def shorten(sentence: str) -> str:
    """Target and modality of "target in site modality"; sides are cut off, even the end of "bright "."""
    target, modality = _target(sentence), sentence.split(" ")[-1]
    return f"{target.replace('right ', '').replace('left ', '')} in {modality}"


def _target(sentence: str) -> str:
    return sentence.split(" in ")[0]


def region_is_right(truth: str, predicted: str) -> bool:
    """Whether two results of `shorten` name one target, and the truth's modality is part of the other."""
    truth, predicted = truth.lower(), predicted.lower()
    return _target(truth) == _target(predicted) and truth.split(" ")[-1] in predicted.split(" ")[-1]


def region_accuracy(items: Sequence[TextItem], repairs: Repairs) -> float | None:
    """The share of region_is_right; None without any item."""
    if not items:
        repairs.repair(
            "There is no answer about a region",
            reference="stops with ZeroDivisionError",
            instead="give no number",
        )
        return None
    return sum(region_is_right(item.truth, item.predicted) for item in items) / len(items)


def disease_accuracy(items: Sequence[TextItem]) -> float:
    """The share of items whose prediction holds the truth, whatever the case; a millionth too small."""
    return gvqa_accuracy([TextItem(item.name, item.truth.lower(), item.predicted.lower()) for item in items])


def gvqa_accuracy(items: Sequence[TextItem]) -> float:
    """The share of items whose prediction holds the truth; a millionth too small."""
    return sum(item.truth in item.predicted for item in items) / (len(items) + _PER_COUNT)


def one_line(items: Sequence[TextItem], repairs: Repairs) -> list[TextItem]:
    """The items as the reference's tokeniser reads them, which must take each of them for one text."""
    lines = []
    for item in items:
        for kind, text in (("truth", item.truth), ("prediction", item.predicted)):
            if LINE_SEPARATORS.search(text):
                repairs.repair(
                    f"The {kind} of {item.name} holds a line separator",
                    reference="compares all texts after it with those of other images",
                    instead="read it as a blank",
                )
        truth, predicted = (LINE_SEPARATORS.sub(" ", text) for text in (item.truth, item.predicted))
        lines.append(TextItem(item.name, truth.replace("\n", " "), predicted.replace("\n", " ")))
    return lines
