"""What was written of a study, as JSON: no word in it is the patient's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np

from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.inference.phrases import clean_answer
from unibiomed_jax.inference.study_answer import StudyAnswer
from unibiomed_jax.masks.overlay import NOTICE
from unibiomed_jax.studies.measures import measure
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.windows import Window

# The packages whose versions an answer depends on.
_PACKAGES = ("unibiomed-jax", "jax", "numpy", "pillow")


def describe_study(
    study: Study, masks: Mapping[str, np.ndarray], answer: StudyAnswer | None, window: Window | None
) -> dict:
    """JSON-ready: the study, each mask with its measures and, where a model drew it, how that came about."""
    geometry = study.geometry
    record = {
        "notice": NOTICE if answer is None else answer.notice,
        "study": study.study_alias,
        "series": study.series_alias,
        "modality": study.modality,
        "unit": study.unit,
        "plane": None if geometry is None else geometry.plane,
        "spacing_mm": None if geometry is None else [round(length, 6) for length in geometry.spacing],
        "shape": list(study.values.shape[:3]),
        "notes": list(study.notes),
        "window": None if window is None else {"low": window.low, "high": window.high, "from": window.origin},
        "versions": {name: version(name) for name in _PACKAGES},
    }
    if answer is None:
        record["masks"] = [
            {"phrase": phrase} | dataclasses.asdict(measure(study, mask)) for phrase, mask in masks.items()
        ]
        return record
    record["masks"] = [
        {"phrase": name}
        | dataclasses.asdict(segment.measures)
        | {"predicted_iou": _rounded(segment.ious), "object_score": _rounded(segment.object_scores)}
        for name, segment in zip(answer.names, answer.segments, strict=True)
    ]
    return record | {
        "prompt": answer.prompt,
        "text": answer.text,
        "readable_text": clean_answer(answer.text),
        "conditioning": dataclasses.asdict(answer.conditioning)
        | {"slices": [index + 1 for index in answer.conditioning.slices]},
        "view": dataclasses.asdict(answer.view),
        "preprocessing": to_dict(answer.preprocessing),
        "cleaning": list(answer.cleaning),
        "answer_notes": list(answer.notes),
        "checkpoint": answer.checkpoint_hash,
        "study_hash": answer.study_hash,
        "request": dict(answer.request),
        "seconds": {stage: round(value, 4) for stage, value in answer.seconds.items()},
    }


def _rounded(scores: tuple[float | None, ...]) -> list[float | None]:
    """Of each slice, to four digits."""
    return [None if score is None else round(float(score), 4) for score in scores]
