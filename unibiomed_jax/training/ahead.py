"""All programs of a run compiled before its first update, at once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from unibiomed_jax.data.plan import Shape
from unibiomed_jax.parameters import Parameters
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.footprint import abstract_batch
from unibiomed_jax.training.step import TrainState, TrainStep

# Bytes that the compiler of the published recipe's dearest shape takes.
ROOM = 6 << 30


def compile_ahead(
    config: TrainConfig,
    layout: Layout,
    step: TrainStep,
    state: TrainState,
    frozen: Parameters,
    shapes: Sequence[Shape],
) -> float:
    """Compile the step for batches of these shapes, as many at once as there is room for; seconds that took.

    A compiler works on about one core and leaves Python alone meanwhile, so a machine with enough of both
    takes as long as the slowest shape needs, where the first epoch would else wait for one after the other.
    JAX keeps what was compiled for the calls to come.
    """
    started = time.perf_counter()
    longest_first = sorted(shapes, key=lambda shape: -shape.tokens)
    batches = [abstract_batch(config, layout, shape) for shape in longest_first]
    if config.optim.accumulate == 1:
        programs = [(step.whole, (state, frozen, batch)) for batch in batches]
    else:
        total = layout.abstract(jax.eval_shape(step.nothing, state.trainable), "optimizer")
        counts = [_results(step.count, batch) for batch in batches]
        programs = [
            (step.accumulate, (total, state, frozen, batch, counted, jnp.int32(0)))
            for batch, counted in zip(batches, counts, strict=True)
        ]
        programs += [(step.nothing, (state.trainable,)), (step.finish, (state, total, counts[0]))]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with ThreadPoolExecutor(max(1, min(len(os.sched_getaffinity(0)), free // ROOM))) as threads:
        for done in [threads.submit(_compile, *program) for program in programs]:
            done.result()
    return time.perf_counter() - started


def _compile(function, arguments: tuple) -> None:
    function.lower(*arguments).compile()


def _results(function, *arguments):
    """What a function gives, as abstract arrays that lie where its results will."""
    compiled = function.lower(*arguments).compile()
    return jax.tree.map(
        lambda result, place: jax.ShapeDtypeStruct(result.shape, result.dtype, sharding=place),
        jax.eval_shape(function, *arguments),
        compiled.output_shardings,
    )
