"""What an update needs of a device's memory, from its compiled program."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from unibiomed_jax.data.pipeline import Pipeline, collate
from unibiomed_jax.data.plan import Shape
from unibiomed_jax.data.transforms import SampleSizes
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training import flops
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.start import Start
from unibiomed_jax.training.step import TrainStep


def footprint(start: Start, step: TrainStep, data: Pipeline) -> tuple[Table, float]:
    """Compile the step for the heaviest batch: MiB a device by part, and the seconds it took to compile."""
    config, layout = start.config, start.layout
    shape = heaviest(config, data.plan.shapes, start.trainable)
    batch = abstract_batch(config, layout, shape)
    program, arguments, parts = update_program(config, step, start.abstract, batch, layout)
    started = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    seconds = time.perf_counter() - started
    table = Table("part", "MiB a device", title="Memory of one update")
    for name, tree in parts.items():
        table.add_row(name, f"{device_bytes(tree) / 2**20:,.1f}")
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    table.add_row("gradients and activations", f"{temporaries / 2**20:,.1f}")
    return table, seconds


def abstract_batch(config: TrainConfig, layout: Layout, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch of a shape, and where they lie."""
    blank = collate([None] * config.data.batch_size, shape, SampleSizes.of(config.model))
    return {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout.batch)
        for name, value in blank.items()
    }


def update_program(
    config: TrainConfig, step: TrainStep, abstract: dict, batch: dict, layout: Layout
) -> tuple[Any, tuple, dict[str, Any]]:
    """The function that a batch goes through, its abstract arguments, and what a device holds by part."""
    state, frozen = abstract["train"], abstract["frozen"]
    parts = {
        "trainable parameters": state.trainable,
        "optimiser": state.moments,
        "frozen parameters": frozen,
        "batch": batch,
    }
    if state.average is not None:
        parts["running average"] = state.average
    if config.optim.accumulate == 1:
        return step.whole, (state, frozen, batch), parts
    total = layout.abstract(jax.eval_shape(step.nothing, state.trainable), "optimizer")
    parts["gradient total"] = total
    counts, index = jax.eval_shape(step.count, batch), jax.ShapeDtypeStruct((), np.int32)
    return step.accumulate, (total, state, frozen, batch, counts, index), parts


def heaviest(config: TrainConfig, shapes: Sequence[Shape], trainable: Collection[str]) -> Shape:
    """The shape of the batch that asks for most arithmetic when every slot of it is taken."""

    def work(shape: Shape) -> float:
        slots = {
            "tile_valid": shape.tiles,
            "token_valid": shape.tokens,
            "labels": shape.tokens,
            "frame_valid": shape.frames,
            "object_valid": shape.objects,
        }
        full = {name: np.ones((config.data.batch_size, count), np.int32) for name, count in slots.items()}
        return flops.step_flops(flops.forward_work(config.model, full, config.lora.rank), trainable)

    return max(shapes, key=work)


def device_bytes(tree) -> int:
    """Bytes a device holds of a tree of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
