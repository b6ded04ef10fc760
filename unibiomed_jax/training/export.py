"""From a train state to what the predictor, the conversion to PyTorch and peft read."""

from __future__ import annotations

import logging
from pathlib import Path

import jax.numpy as jnp

from unibiomed_jax import checkpoint
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.parameters import Parameters
from unibiomed_jax.training.step import TrainState

logger = logging.getLogger(__name__)


def trained_parameters(state: TrainState) -> Parameters:
    """What the run is for: the running average where there is one."""
    return state.trainable if state.average is None else state.average


def export_model(
    folder: Path, config: TrainConfig, state: TrainState, frozen: Parameters, tokenizer: Path
) -> None:
    """Write `folder/model`, adapters merged, and `folder/adapter` for peft if only the decoder is adapted.

    Raises:
        InputError: the folder cannot be written.
    """
    settings = config.lora
    parameters = trained_parameters(state) | frozen
    elsewhere = [path for path in parameters if ".lora." in path and not path.startswith(lora.DECODER)]
    if elsewhere:
        logger.warning(
            "%s is not written, since peft knows the decoder's adapters alone and %s has one, too; "
            "all are merged into the model.",
            folder / "adapter",
            elsewhere[0].partition(".lora.")[0],
        )
    elif settings.rank:
        lora.save_peft_adapter(
            folder / "adapter",
            parameters,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
        )
    # Before the adapters are merged, so that the sum is not rounded to the format of what was frozen.
    parameters = {
        path: value if ".lora." in path else jnp.asarray(value, config.export_dtype)
        for path, value in parameters.items()
    }
    if settings.rank:
        parameters = checkpoint.merge_adapters(parameters, settings.alpha / settings.rank)
    checkpoint.save(
        folder / "model",
        config.model,
        checkpoint.unflatten(parameters),
        tokenizer,
        release=Path(config.initial) / "release" if config.initial else None,
        overwrite=True,
    )
