"""UniBiomed in JAX: grounded biomedical vision-language modelling for research."""

from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.predictor import Answer, Request, Segment, UniBiomed

__all__ = ["Answer", "InputError", "Request", "Segment", "UniBiomed"]
