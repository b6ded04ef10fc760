"""The answer to a question about a study: words, masks on its own grid, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from unibiomed_jax.config.preprocessing import Preprocessing
from unibiomed_jax.inference.answer import INTENDED_USE
from unibiomed_jax.studies.measures import Measures
from unibiomed_jax.studies.views import View
from unibiomed_jax.studies.windows import Window


@dataclass(frozen=True)
class StudySegment:
    """What one `[SEG]` of the answer points at."""

    # The words it stands for, as `Segment.phrase`; said again it is numbered.
    phrase: str
    # True inside, on the grid of `Study.values`.
    mask: Bool[np.ndarray, "slices rows columns"]
    # Of each slice, as `Segment.iou` and `Segment.object_score`; None where this slice has no such mask.
    ious: tuple[float | None, ...]
    object_scores: tuple[float | None, ...]
    measures: Measures


@dataclass(frozen=True)
class Conditioning:
    """Which slices the language model saw, and why these."""

    # "auto", "first", "stated", or "each": every slice was asked by itself.
    choice: str
    # Numbers of the slices, from 0, in order.
    slices: tuple[int, ...]
    # A sentence for people.
    reason: str
    # Of "auto", slice by slice in the first pass: the share that what was asked for is in it (presence), and
    # how well its masks agree with those of its neighbours (Dice). Empty otherwise.
    presence: tuple[float, ...] = ()
    agreement: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudyAnswer:
    """What the model says about a study."""

    # The question as it was given to the model.
    prompt: str
    # The answer as generated: special tokens and `<|end|>` are kept.
    text: str
    segments: tuple[StudySegment, ...]
    conditioning: Conditioning
    # What became black and white; None: the study is in colour.
    window: Window | None
    # How stored slices were turned and made square.
    view: View
    # What the checkpoint says about the slices it was trained on.
    preprocessing: Preprocessing
    # What was done to the masks afterwards, a sentence each (parts or small ones left out).
    cleaning: tuple[str, ...]
    # What one should know about the way it was asked, a sentence each.
    notes: tuple[str, ...]
    # sha256 of the weights and of the values and places of the study.
    checkpoint_hash: str
    study_hash: str
    # Everything the answer depends on beside these two hashes, JSON-ready.
    request: Mapping
    # Seconds by stage.
    seconds: Mapping[str, float] = field(default_factory=dict)
    # To be shown with every answer.
    notice: str = INTENDED_USE

    @property
    def masks(self) -> dict[str, Bool[np.ndarray, "slices rows columns"]]:
        """Phrase -> mask; a phrase said again is numbered: "kidney", "kidney (2)"."""
        return dict(zip(self.names, (segment.mask for segment in self.segments), strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The phrase of each segment, each of them once."""
        return distinct([segment.phrase for segment in self.segments])


def distinct(phrases: Sequence[str]) -> tuple[str, ...]:
    """Phrases as names, those said again numbered; what has no words is a region."""
    names: list[str] = []
    for phrase in phrases:
        name, number = phrase or "region", 1
        while name in names:
            number += 1
            name = f"{phrase or 'region'} ({number})"
        names.append(name)
    return tuple(names)
