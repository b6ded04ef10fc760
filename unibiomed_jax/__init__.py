"""UniBiomed in JAX: grounded biomedical vision-language modelling for research."""

import importlib
from typing import TYPE_CHECKING

from unibiomed_jax.errors import InputError

if TYPE_CHECKING:
    from unibiomed_jax.inference.answer import Answer, OpenedImage, Request, Sampling, Segment
    from unibiomed_jax.inference.predictor import UniBiomed
    from unibiomed_jax.inference.study_answer import StudyAnswer
    from unibiomed_jax.outputs.study_folder import write_study
    from unibiomed_jax.studies.opening import open_study
    from unibiomed_jax.studies.study import Study

# Where each name is, but for what is here already.
_PLACES = {
    "Answer": "inference.answer",
    "OpenedImage": "inference.answer",
    "Request": "inference.answer",
    "Sampling": "inference.answer",
    "Segment": "inference.answer",
    "Study": "studies.study",
    "StudyAnswer": "inference.study_answer",
    "UniBiomed": "inference.predictor",
    "open_study": "studies.opening",
    "write_study": "outputs.study_folder",
}
__all__ = [
    "Answer",
    "InputError",
    "OpenedImage",
    "Request",
    "Sampling",
    "Segment",
    "Study",
    "StudyAnswer",
    "UniBiomed",
    "open_study",
    "write_study",
]


def __getattr__(name: str):
    """What is named when it is first asked for: the predictor brings JAX along, which data does not need."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"unibiomed_jax.{_PLACES[name]}"), name)
