"""From a train state to what the predictor, the conversion to PyTorch and peft read."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from unibiomed_jax import checkpoint, distributed
from unibiomed_jax.conversion.peft import DECODER, save_peft_adapter
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import locate
from unibiomed_jax.parameters import Parameters, merge_adapters, unflatten
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.snapshot import Checkpointer
from unibiomed_jax.training.start import Start, belongs_to, cast, starting_state
from unibiomed_jax.training.step import TrainState, trained_parameters

logger = logging.getLogger(__name__)


def export_model(
    folder: Path, config: TrainConfig, state: TrainState, frozen: Parameters, tokenizer: Path
) -> None:
    """Write `folder/model`, adapters merged, and `folder/adapter` for peft if only the decoder is adapted.

    Every process calls it with its shares of the parameters.

    Raises:
        InputError: the folder cannot be written.
    """
    settings = config.lora
    parameters = trained_parameters(state) | frozen
    elsewhere = [path for path in parameters if ".lora." in path and not path.startswith(DECODER)]
    if elsewhere:
        logger.warning(
            "%s is not written, since peft knows the decoder's adapters alone and %s has one, too; "
            "all are merged into the model.",
            folder / "adapter",
            elsewhere[0].partition(".lora.")[0],
        )
    elif settings.rank:
        adapters = {path: distributed.whole(value) for path, value in parameters.items() if ".lora." in path}
        if distributed.is_first():
            save_peft_adapter(
                folder / "adapter",
                adapters,
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
            )
    # Before the adapters are merged, so that the sum is not rounded to the format of what was frozen.
    dtype = jnp.dtype(config.export_dtype)
    others = {p: value for p, value in parameters.items() if ".lora." not in p and value.dtype != dtype}
    places = {path: value.sharding for path, value in others.items()}
    # One program for all: one for each takes longer to compile.
    parameters |= jax.jit(functools.partial(cast, dtype=dtype), out_shardings=places)(others)
    if settings.rank:
        parameters = merge_adapters(parameters, settings.alpha / settings.rank)
    checkpoint.save(
        folder / "model",
        config.model,
        unflatten(parameters),
        tokenizer,
        release=locate(config.initial) / "release" if config.initial else None,
        overwrite=True,
    )


def export_checkpoint(start: Start, named: str) -> int:
    """Write the model of a checkpoint of a run; it needs no data.

    Args:
        named: "last", "best" or an update.

    Returns:
        The update it was saved at.

    Raises:
        InputError: there is no such checkpoint, or it belongs to another model.
    """
    config = start.config
    checkpointer = Checkpointer(start.checkpoint_folder, config.checkpoint)
    step = distributed.first_says(lambda: _step_of(checkpointer, named))
    restored, state, frozen = starting_state(start, checkpointer, belongs_to(config), step)
    export_model(locate(config.folder), config, state, frozen, start.tokenizer_folder)
    return restored.step


def _step_of(checkpointer: Checkpointer, named: str) -> int | None:
    """The update of the checkpoint of that name; None is the newest undamaged one."""
    steps = checkpointer.steps()
    if named == "last" and steps:
        return None
    known = {"best": checkpointer.best()} | {str(step): step for step in steps}
    if known.get(named) is None:
        raise InputError(
            f"There is no checkpoint {named!r} in {checkpointer.folder}; it holds {steps or 'none'}."
        )
    return known[named]
