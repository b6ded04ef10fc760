"""UniBiomed in JAX: grounded biomedical vision-language modelling for research."""

from typing import TYPE_CHECKING

from unibiomed_jax.errors import InputError

if TYPE_CHECKING:
    from unibiomed_jax.inference.predictor import Answer, Request, Segment, UniBiomed

__all__ = ["Answer", "InputError", "Request", "Segment", "UniBiomed"]


def __getattr__(name: str):
    """The predictor, when it is first asked for: it brings JAX along, which reading data does not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unibiomed_jax.inference import predictor

    return getattr(predictor, name)
