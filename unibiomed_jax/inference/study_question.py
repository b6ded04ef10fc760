"""What a study is asked, and all that an answer depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.config.preprocessing import Preprocessing
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.answer import Answer, OpenedImage, Request
from unibiomed_jax.inference.stages import Stages
from unibiomed_jax.studies.grey import choose_window
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.views import find_view
from unibiomed_jax.studies.windows import Window

# Which slices the language model sees: chosen by a first pass over all, the first ones as in the reference,
# every one by itself, or these numbers from 0.
Conditions = Literal["auto", "first", "each"] | Sequence[int]
# Where the words of the site that belong to the window are put into a question.
SITE = "{site}"


@dataclasses.dataclass(frozen=True)
class StudyQuestion:
    """How a study is asked; every field changes the answer."""

    conditioning: Conditions = "auto"
    # A name of the checkpoint's windows, "own", "percentile", or (low, high); None: what it saw of such.
    window: str | tuple[float, float] | None = None
    # Keep so many connected parts of a mask, the largest ones.
    parts: int | None = None
    # Leave out connected parts of less volume, ml.
    smallest_ml: float | None = None
    # Empty masks, slice by slice, whose object score is not above 0.
    hide_absent: bool = False
    # Longest answer, tokens.
    max_new_tokens: int = 256
    # Stop an answer with so many masks.
    max_masks: int | None = None


class Answerer(Protocol):
    """What is needed of `UniBiomed`."""

    config: ModelConfig
    params: Any
    stages: Stages
    precision: Precision
    checkpoint_hash: str

    def open(self, image: Image.Image) -> OpenedImage: ...

    def predict_batch(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        max_masks: int | None,
        hide_absent: bool,
    ) -> list[Answer]: ...

    def say(
        self, request: Request, *, max_new_tokens: int, max_masks: int | None
    ) -> tuple[str, np.ndarray]: ...


def request_of(model: Answerer, study: Study, prompt: str, question: StudyQuestion) -> dict:
    """Everything that an answer depends on beside weights and study, JSON-ready.

    Raises:
        InputError: nothing says how the study is to be shown.
    """
    preprocessing = model.config.preprocessing
    window, prompt, _ = shown_as(study, prompt, preprocessing, question)
    choice = question.conditioning
    asked = vars(question) | {
        "conditioning": choice if isinstance(choice, str) else [int(index) for index in choice],
        "window": None if window is None else _described(window),
    }
    request = {
        "prompt": prompt,
        **asked,
        "view": dataclasses.asdict(find_view(study, preprocessing)),
        "preprocessing": to_dict(preprocessing),
        "precision": to_dict(model.precision),
        "version": version("unibiomed-jax"),
    }
    return json.loads(json.dumps(request))  # equal to what a record of it says


def _described(window: Window) -> dict:
    """A window, JSON-ready."""
    table = None if window.table is None else hashlib.sha256(np.ascontiguousarray(window.table)).hexdigest()
    ends = {"low": float(window.low), "high": float(window.high)}
    return ends | {"from": window.origin, "curve": window.curve, "table": table}


def hash_of(study: Study) -> str:
    """sha256 of the values of a study and of where they lie."""
    about = (study.values.shape, str(study.values.dtype), study.modality, study.unit, study.white_is_low)
    digest = hashlib.sha256(repr(about).encode())
    for index, values in enumerate(study.values):
        digest.update(np.ascontiguousarray(values))
        if study.padding is not None:
            digest.update(np.packbits(study.padding[index]))
    if study.geometry is not None:
        for place in (study.geometry.origins, study.geometry.across, study.geometry.down):
            digest.update(np.ascontiguousarray(place))
    return digest.hexdigest()


def require_possible(question: StudyQuestion, study: Study) -> None:
    """Refuse what cannot be done before anything is computed."""
    if question.parts is not None and question.parts < 1:
        raise InputError(f"parts is {question.parts}; keep at least one connected part, or leave it out.")
    if question.smallest_ml is not None:
        if not question.smallest_ml > 0:
            raise InputError(
                f"smallest_ml is {question.smallest_ml}; give a volume above 0, or leave it out."
            )
        if study.geometry is None or len(study.geometry.uneven):
            raise InputError(
                f"The volume of a part of {study.series_alias} is not known, for its pixels have no size or "
                "its slices no even distance; leave smallest_ml out."
            )


def shown_as(
    study: Study, prompt: str, preprocessing: Preprocessing, question: StudyQuestion
) -> tuple[Window | None, str, list[str]]:
    """The window of a study, the question with the words of its site, and what is odd about it."""
    window = None if study.is_colour else choose_window(study, preprocessing, question.window)
    preset = preprocessing.ct_window("" if window is None else window.origin.removeprefix("preset "))
    wording = "" if preset is None else preset.wording
    if SITE in prompt:
        if not wording:
            raise InputError(
                f"No words belong to the window {'of colours' if window is None else window}; write the site "
                f"into the question instead of {SITE}."
            )
        return window, prompt.replace(SITE, wording), []
    if wording and wording.lower() not in prompt.lower():
        return window, prompt, [f"in training, questions about this window named the site: {wording!r}"]
    return window, prompt, []
