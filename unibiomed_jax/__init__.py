"""UniBiomed in JAX: grounded biomedical vision-language modelling for research."""

import importlib
from typing import TYPE_CHECKING

from unibiomed_jax.errors import InputError

if TYPE_CHECKING:
    from unibiomed_jax.inference.answer import Answer, OpenedImage, Request, Sampling, Segment
    from unibiomed_jax.inference.predictor import UniBiomed

__all__ = ["Answer", "InputError", "OpenedImage", "Request", "Sampling", "Segment", "UniBiomed"]


def __getattr__(name: str):
    """The predictor, when it is first asked for: it brings JAX along, which reading data does not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = "predictor" if name == "UniBiomed" else "answer"
    return getattr(importlib.import_module(f"unibiomed_jax.inference.{place}"), name)
