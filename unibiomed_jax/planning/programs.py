"""The programs that are planned: an update of a training run, and an answer with its stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import BFLOAT16, Precision
from unibiomed_jax.data.plan import Shape
from unibiomed_jax.inference.generate import Limits, StopText
from unibiomed_jax.inference.stages import StageIds, Stages
from unibiomed_jax.models.sam2 import FramePlan, plan_frames
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import flatten, stored_for, unflatten
from unibiomed_jax.planning.topologies import Topology, find_topology
from unibiomed_jax.sharding.layout import Layout, mesh_sizes, parse_mesh, spread
from unibiomed_jax.sharding.strategies import find_strategy, mesh_axes_of
from unibiomed_jax.training import flops
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.footprint import abstract_batch, update_program
from unibiomed_jax.training.forward import TokenIds
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.losses import IGNORE
from unibiomed_jax.training.start import abstract_state
from unibiomed_jax.training.step import TrainStep

# The functions of an answer; "ground" is all of them in one.
AnswerProgram = Literal[
    "ground", "encode_tiles", "prefill", "advance", "encode_image", "segment", "segment_frames"
]
# Samples that one copy of the weights is worth dividing among: more shares are smaller than a vector unit.
MOST_SHARES = 64
# Ids that stand for the tokenizer's: they are constants of a program, not its size.
IDS = TokenIds(image=2, seg=1)
STAGE_IDS = StageIds(end=0, seg=1, pause=3)
# Tokens of the stop text behind its first.
STOP_TOKENS = 4


@dataclass(frozen=True)
class TrainCase:
    """An update of a run on devices of a topology."""

    # What is shown: "unibiomed-1b, LoRA".
    title: str
    # With strategy, mesh and batch size (of all devices).
    config: TrainConfig
    # Of the batch; every slot of it counts as taken.
    shape: Shape
    topology: str


@dataclass(frozen=True)
class AnswerCase:
    """Answers about a batch of images, or a stage of them, on devices of a topology."""

    title: str
    model: ModelConfig
    program: AnswerProgram
    topology: str
    # Answers at a time.
    batch: int
    # Of each: tiles, tokens of the question, tokens of the answer, masks; frames of a volume.
    tiles: int
    tokens: int
    new_tokens: int
    objects: int
    frames: int = 1
    precision: Precision = BFLOAT16
    strategy: str = "data_parallel"
    mesh: str | None = None


Case = TrainCase | AnswerCase


@dataclass(frozen=True)
class Program:
    """A function to compile, and what is known of it beforehand."""

    function: Any
    arguments: tuple
    layout: Layout
    # What a device holds while it runs, by part.
    held: dict[str, Any]
    # Operations that its result needs (see training/flops.py), of all devices; 0 where that is not counted.
    useful: float
    # Samples, or answers, and tokens said.
    samples: int
    said: int = 0
    # How often a loop of unknown length runs: over tokens that are said, or chunks of learned ones.
    trips: int = 1
    # Bytes that cannot but be read at every token, of all devices together.
    every_token: int = 0
    # Arguments that are constants of the program, by name.
    static: dict[str, Any] = field(default_factory=dict)


def layout_on(topology: Topology, strategy: str, mesh: str | None, model: ModelConfig) -> Layout:
    """A strategy over the devices of a topology.

    Raises:
        InputError: the strategy does not fit it.
    """
    sizes = mesh_on(topology, strategy, mesh)
    return Layout.over(topology.devices(), find_strategy(strategy), model, sizes)


def mesh_on(topology: Topology, strategy: str, mesh: str | None) -> dict[str, int]:
    """Devices along the axes of a mesh, as said or as the strategy asks.

    Raises:
        InputError: the mesh has another number of devices, or cannot be read.
    """
    sizes = parse_mesh(mesh) if mesh else default_mesh(topology, strategy)
    mesh_sizes(sizes, find_strategy(strategy), topology.chips * topology.chip.devices_per_chip)
    return sizes


def default_mesh(topology: Topology, strategy: str) -> dict[str, int]:
    """How devices are spread where nobody says: copies are on different slices, shares on neighbours."""
    devices = topology.chips * topology.chip.devices_per_chip
    axes = mesh_axes_of(find_strategy(strategy))
    if len(axes) == 1:
        return {axes[0]: devices}
    within = min(devices, MOST_SHARES, topology.devices_in_slice)
    if strategy == "hsdp":
        within = within if within < devices else max(1, devices // 2)
        return {"replica": devices // within, "fsdp": within}
    if strategy == "sequence" and devices > MOST_SHARES:
        return {"fsdp": MOST_SHARES, "sequence": devices // MOST_SHARES}
    return spread(axes, devices)


def build(case: Case) -> Program:
    """The program of a case.

    Raises:
        InputError: strategy, mesh or batch do not fit the topology.
    """
    topology = find_topology(case.topology)
    if isinstance(case, TrainCase):
        return _update(case, layout_on(topology, case.config.strategy, case.config.mesh, case.config.model))
    return _answer(case, layout_on(topology, case.strategy, case.mesh, case.model))


def _update(case: TrainCase, layout: Layout) -> Program:
    config, shape = case.config, case.shape
    layout.require_divisible(config.data.batch_size)
    graphdef, shapes = structure(config)
    abstract = abstract_state(config, shapes, layout)
    layout.require_useful(abstract["frozen"])
    layout.require_useful(abstract["train"].trainable, "optimizer")
    step = TrainStep(graphdef, config, IDS, layout)
    batch = abstract_batch(config, layout, shape)
    function, arguments, held = update_program(config, step, abstract, batch, layout)
    rows = config.data.batch_size
    full = _slots(rows, shape.tiles, shape.tokens, shape.tokens, shape.frames, shape.objects)
    work = flops.forward_work(config.model, full, config.lora.rank)
    useful = flops.step_flops(work, abstract["train"].trainable)
    chunks = -(-shape.tokens // config.loss.token_chunk)
    return Program(function, arguments, layout, held, useful, rows, trips=chunks)


def _slots(rows: int, tiles: int, tokens: int, learned: int, frames: int, objects: int) -> dict:
    """A batch of which every slot is taken, as `flops.forward_work` reads it."""
    labels = np.full((rows, tokens), IGNORE)
    labels[:, tokens - learned :] = 0
    return {
        "tile_valid": np.ones((rows, tiles), bool),
        "token_valid": np.ones((rows, tokens), bool),
        "labels": labels,
        "frame_valid": np.ones((rows, frames), bool),
        "object_valid": np.ones((rows, objects), bool),
    }


def _answer(case: AnswerCase, layout: Layout) -> Program:
    model, precision, rows = case.model, case.precision, case.batch
    whole = NamedSharding(layout.mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), tree)

    network = nnx.eval_shape(lambda: UniBiomedModel(model, precision, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(network)
    stored = jax.eval_shape(lambda table: stored_for(table, model, precision), flatten(state))
    table = layout.abstract(stored)
    layout.require_useful(table)
    nnx.replace_by_pure_dict(state, unflatten(table))
    stages = Stages(graphdef, STAGE_IDS, layout)

    vision, sam2, width = model.vision, model.sam2, model.language.hidden_size
    new, objects, size = case.new_tokens, case.objects, sam2.image_size
    numbers = jnp.dtype(precision.language)
    ids, source = array((rows, case.tokens), np.int32), array((rows, case.tokens), np.int32)
    forced, lengths = array((rows, new), np.int32), array((rows,), np.int32)
    limits = Limits(array((rows,), np.int32), array((rows,), np.int32))
    stop = StopText(array((model.language.vocab_size,), np.bool_), array((STOP_TOKENS,), np.int32))
    visual_rows = array((rows, max(1, case.tiles * model.tokens_per_tile), width), np.float32)
    images = array((rows, size, size, 3), np.uint8)
    prefill = (ids, source, lengths, visual_rows, forced, limits)

    def plan(batch: tuple[int, ...] = ()) -> FramePlan:
        steps = plan_frames(case.frames, sam2)
        return FramePlan(*(array((*batch, *part.shape), part.dtype) for part in steps))

    def decoding() -> Any:
        return placed(jax.eval_shape(stages.prefill, state, *prefill))

    def features() -> Any:
        one = array((1, size, size, 3), np.uint8)
        return placed(jax.eval_shape(stages.encode_image, state, one))

    tiles = (rows * max(case.tiles, 1), vision.image_size, vision.image_size, 3)
    arguments: dict[str, Callable[[], tuple]] = {
        "ground": lambda: (
            array((rows, case.tiles, *tiles[1:]), np.uint8),
            *prefill[:3],
            array((rows, case.frames, size, size, 3), np.uint8),
            forced,
            limits,
            None,
            stop,
            plan((rows,)) if case.frames > 1 else None,
        ),
        "encode_tiles": lambda: (array(tiles, np.uint8),),
        "prefill": lambda: prefill,
        "advance": lambda: (
            decoding(),
            array((rows,), np.bool_),
            array((), np.int32),
            stop,
        ),
        "encode_image": lambda: (images,),
        "segment": lambda: (features(), array((objects, width), numbers)),
        "segment_frames": lambda: (
            array((case.frames, size, size, 3), np.uint8),
            array((objects, width), numbers),
            plan(),
        ),
    }
    given = arguments[case.program]()
    held = {"parameters": table, "inputs": given}
    speaks = case.program in ("ground", "advance")
    useful, every_token = 0.0, 0
    if case.program == "ground":
        full = _slots(rows, case.tiles, case.tokens + new, new, case.frames, objects)
        useful = flops.step_flops(flops.forward_work(model, full), ())
    if speaks:
        tied = model.language.tie_word_embeddings
        every_token = sum(
            leaf.size * leaf.dtype.itemsize
            for path, leaf in table.items()
            if path.startswith("language_model.") and (tied or not path.endswith("embed_tokens"))
        )
        cache = decoding().cache
        every_token += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return Program(
        getattr(stages, case.program),
        (state, *given),
        layout,
        held,
        useful,
        rows if case.program not in ("segment", "segment_frames") else 1,
        rows * new if speaks else 0,
        new if speaks else 1,
        every_token,
        {"objects": objects} if case.program == "ground" else {},
    )
