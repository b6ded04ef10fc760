"""What a validation measures: losses, Dice, and answers that are right to the last token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from unibiomed_jax.data.records import TEXT_ONLY, Kind
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.forward import (
    Batch,
    LossCounts,
    LossSums,
    TokenIds,
    count_targets,
    loss_sums,
    mean_losses,
    predict,
)
from unibiomed_jax.training.losses import IGNORE, next_token_labels
from unibiomed_jax.training.parameters import Parameters, merge

# Measures of `summarise` of which higher is better.
SCORES = (
    "dice",
    *(f"dice/{kind}" for kind in Kind if kind not in TEXT_ONLY),
    *(f"answers/{kind}" for kind in Kind),
)


class Measured(NamedTuple):
    """What one validation batch gives."""

    sums: LossSums
    counts: LossCounts
    # Every learned token of the row has the highest score: greedy decoding says exactly this answer, since
    # it sees the same tokens up to its first mistake.
    right: Bool[Array, " batch"]
    # Dice of the mask against the truth at SAM2's mask resolution, and where there is a truth to compare.
    dice: Float[Array, "batch objects frames"]
    dice_valid: Bool[Array, "batch objects frames"]
    # Where the mask's logit is above zero.
    masks: Bool[Array, "batch objects frames M M"]


def dice_score(
    predicted: Bool[Array, "*batch rows columns"], truth: Bool[Array, "*batch rows columns"]
) -> Float[Array, "*batch"]:
    """2 |P and T| / (|P| + |T|); 1 if both are empty."""
    both = (predicted & truth).sum((-2, -1))
    total = predicted.sum((-2, -1)) + truth.sum((-2, -1))
    return jnp.where(total > 0, 2 * both / jnp.maximum(total, 1), 1.0)


def build_validation(graphdef: nnx.GraphDef, config: TrainConfig, ids: TokenIds):
    """A compiled `measure(trainable, frozen, batch) -> Measured`; without dropout, with fixed points."""

    @jax.jit
    def measure(trainable: Parameters, frozen: Parameters, batch: Batch) -> Measured:
        with jax.default_matmul_precision("highest"):
            model = merge(graphdef, trainable, frozen)
            prediction = predict(
                model, batch, ids, token_chunk=config.loss.token_chunk, track=config.loss.track
            )
        truth = batch["masks"] > 0
        masks = prediction.masks > 0
        learned = (next_token_labels(batch["labels"]) != IGNORE).sum(1)
        return Measured(
            sums=loss_sums(prediction, batch, config.loss, jax.random.key(0)),
            counts=count_targets(batch, ids, config.loss),
            right=(prediction.answers.correct == learned) & (learned > 0),
            dice=dice_score(masks, truth),
            dice_valid=prediction.masks_valid & truth.any((-2, -1)),
            masks=masks,
        )

    return measure


def summarise(
    measured: Iterable[tuple[Measured, tuple[str, ...]]], kinds: Mapping[str, str], config: TrainConfig
) -> dict[str, float]:
    """Means over a validation.

    Args:
        measured: every batch with the names of its samples; a row without a name is padding.
        kinds: task of every sample by name.

    Returns:
        The losses; `dice` over all masks with a truth, and by task; `answers`, the share of samples answered
        right to the last token, by task. Measures of which there is no sample are left out.
    """
    sums, counts, values = None, None, defaultdict(list)
    for batch, names in measured:
        batch = jax.device_get(batch)
        sums = batch.sums if sums is None else jax.tree.map(np.add, sums, batch.sums)
        counts = batch.counts if counts is None else jax.tree.map(np.add, counts, batch.counts)
        for row, name in enumerate(names):
            if not name:
                continue
            dice = batch.dice[row][batch.dice_valid[row]].tolist()
            values["dice"] += dice
            values[f"dice/{kinds[name]}"] += dice
            values[f"answers/{kinds[name]}"].append(float(batch.right[row]))
    if sums is None:
        return {}
    losses = {name: float(value) for name, value in mean_losses(sums, counts, config.loss).items()}
    return losses | {name: float(np.mean(found)) for name, found in sorted(values.items()) if found}
