"""Cases by name: the published recipe, and full training, at every size of the family."""

from __future__ import annotations

from typing import Literal

from unibiomed_jax.config.model import ModelConfig, RematConfig
from unibiomed_jax.config.precision import BFLOAT16
from unibiomed_jax.config.presets import MODELS
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.plan import Shape
from unibiomed_jax.planning.programs import AnswerCase, AnswerProgram, TrainCase, mesh_on
from unibiomed_jax.planning.roofline import SAMPLES, UPDATES
from unibiomed_jax.planning.topologies import find_topology
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import find_strategy
from unibiomed_jax.training.config import FreezeConfig, LoraConfig, OptimConfig, TrainConfig

ModelName = Literal["1b", "3b", "7b", "14b"]
SIZES: dict[str, str] = {
    "1b": "unibiomed",
    "3b": "qwen2.5-3b",
    "7b": "qwen2.5-7b",
    "14b": "qwen2.5-14b",
}
Mode = Literal["lora", "full"]
# What trains under "full": everything that a loss reaches; and what is computed again for it.
EVERYTHING = FreezeConfig(trainable=("*",))
ALL_AGAIN = RematConfig(vision="full", language="full", sam2_encoder="full")


def model_of(name: str) -> ModelConfig:
    """The sizes of a model."""
    return MODELS[SIZES[name]]


def train_case(
    topology: str,
    model: str,
    mode: Mode,
    strategy: str,
    mesh: str | None,
    *,
    per_share: int,
    tiles: int,
    tokens: int,
    objects: int,
) -> TrainCase:
    """The published recipe, or full training, with samples of one image of a size.

    Args:
        per_share: samples of each share of the batch (a device's, unless several share a sample).

    Raises:
        InputError: an unknown topology or strategy, or one that does not fit the other.
    """
    sizes = model_of(model)
    place, table = find_topology(topology), find_strategy(strategy)
    spread = mesh_on(place, strategy, mesh)
    rows = per_share * Layout.abstractly(table, sizes, spread).batch_shares
    config = TrainConfig(
        model=sizes,
        precision=BFLOAT16,
        data=PipelineConfig(datasets=(), batch_size=rows),
        lora=LoraConfig() if mode == "lora" else LoraConfig(rank=0),
        freeze=FreezeConfig() if mode == "lora" else EVERYTHING,
        remat=RematConfig() if mode == "lora" else ALL_AGAIN,
        optim=OptimConfig(steps=UPDATES, accumulate=max(1, SAMPLES // rows)),
        strategy=strategy,
        mesh=",".join(f"{axis}={size}" for axis, size in spread.items()),
    )
    title = f"unibiomed-{model} {'LoRA' if mode == 'lora' else 'full'}"
    return TrainCase(title, config, Shape(1, objects, tiles, tokens), place.name)


def answer_case(
    topology: str,
    model: str,
    program: AnswerProgram,
    strategy: str,
    mesh: str | None,
    *,
    batch: int,
    tiles: int,
    tokens: int,
    new_tokens: int,
    objects: int,
    frames: int,
) -> AnswerCase:
    """Answers about images of a size, or about volumes of several frames.

    Raises:
        InputError: an unknown topology or strategy.
    """
    place = find_topology(topology)
    spread = mesh_on(place, strategy, mesh)
    return AnswerCase(
        f"unibiomed-{model} {program}",
        model_of(model),
        program,
        place.name,
        batch,
        tiles,
        tokens,
        new_tokens,
        objects,
        frames,
        strategy=strategy,
        mesh=",".join(f"{axis}={size}" for axis, size in spread.items()),
    )
