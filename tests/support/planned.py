"""Plans of small programs: cases that compile in a second, for chips that nobody has."""

import importlib.util

import pytest
from small import MODEL

from unibiomed_jax.planning.programs import AnswerCase

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)


def small_answer(program="encode_tiles", topology="v5e:2x4", **changes) -> AnswerCase:
    """A stage of an answer of the small model, or all of it."""
    sizes = {"batch": 8, "tiles": 2, "tokens": 12, "new_tokens": 8, "objects": 2} | changes
    return AnswerCase("small", MODEL, program, topology, **sizes)
