"""The model's compiled functions: one a stage, and one for all of them together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from unibiomed_jax.inference import generate
from unibiomed_jax.inputs.prompt import STOP_TEXT
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.sharding.constraints import gather_unstacked
from unibiomed_jax.sharding.layout import Layout


class StageIds(NamedTuple):
    """Ids of the tokens at which the compiled functions do something."""

    # Ends an answer.
    end: int
    # Asks for a mask.
    seg: int
    # The last of the stop text: the host looks at the text.
    pause: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> StageIds:
        return cls(tokenizer.eos_id, tokenizer.seg_id, tokenizer.encode(STOP_TEXT)[-1])


class Stages:
    """Functions of parameters and arrays, compiled once for every shape they meet.

    The parameters are an argument, so that no program holds a copy of them. `ground` is the whole answer; the
    others are its stages.
    """

    def __init__(self, graphdef: nnx.GraphDef, ids: StageIds, layout: Layout):
        """`layout` says what is compiled for."""
        self._graphdef, self._layout = graphdef, layout
        ends = {"end_id": ids.end, "seg_id": ids.seg}
        advance = functools.partial(generate.advance, **ends, pause_id=ids.pause)
        self.encode_tiles = self._compiled(UniBiomedModel.encode_tiles)
        self.blank_rows = self._compiled(generate.blank_rows, static_argnames=("batch", "length"))
        self.lay_tile = layout.jit(generate.lay_tile, donate_argnums=0)
        self.prefill = self._compiled(generate.prefill)
        self.advance = self._compiled(advance, donate_argnums=1)
        self.states_at = layout.jit(generate.states_at)
        self.encode_image = self._compiled(UniBiomedModel.encode_image)
        self.segment = self._compiled(generate.segment_image)
        self.segment_frames = self._compiled(UniBiomedModel.segment_frames)
        self.empty_track = self._compiled(UniBiomedModel.empty_track, static_argnames="objects")
        self.segment_step = self._compiled(UniBiomedModel.segment_step, donate_argnums=1)
        ground = functools.partial(generate.ground, **ends)
        self.ground = self._compiled(ground, static_argnames="objects")

    def programs(self) -> int:
        """How many programs have been compiled so far."""
        return sum(stage._cache_size() for stage in vars(self).values() if hasattr(stage, "_cache_size"))

    def _compiled(self, function: Callable, **jit_options) -> Any:
        def run(params, *arguments, **options):
            # float32 means float32 on every backend; bfloat16 products are not touched by this.
            with jax.default_matmul_precision("highest"):
                model = nnx.merge(self._graphdef, gather_unstacked(params))
                return function(model, *arguments, **options)

        return self._layout.jit(run, **jit_options)
