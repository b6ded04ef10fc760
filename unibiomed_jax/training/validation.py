"""What a validation measures: losses, Dice, and answers that are right to the last token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from unibiomed_jax import distributed
from unibiomed_jax.data.pipeline import Pipeline
from unibiomed_jax.data.records import TEXT_ONLY, Kind
from unibiomed_jax.masks.measures import dice_score
from unibiomed_jax.parameters import Parameters, merge
from unibiomed_jax.sharding.constraints import gather_unstacked
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.forward import (
    Arrays,
    LossCounts,
    LossSums,
    TokenIds,
    answer_batch,
    count_targets,
    loss_sums,
    mean_losses,
)
from unibiomed_jax.training.log import RunLog, mask_picture
from unibiomed_jax.training.losses import IGNORE, next_token_labels
from unibiomed_jax.training.snapshot import Checkpointer
from unibiomed_jax.training.step import TrainState, trained_parameters

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


def build_validation(graphdef: nnx.GraphDef, config: TrainConfig, ids: TokenIds, layout: Layout):
    """A compiled `measure(trainable, frozen, batch) -> Measured`; without dropout, with fixed points."""

    @layout.jit
    def measure(trainable: Parameters, frozen: Parameters, batch: Arrays) -> Measured:
        with jax.default_matmul_precision("highest"):
            model = merge(graphdef, gather_unstacked(trainable), gather_unstacked(frozen))
            prediction = answer_batch(
                model, batch, ids, token_chunk=config.loss.token_chunk, follow=config.loss.follow
            )
        truth = batch["masks"] > 0
        masks = prediction.masks > 0
        learned = (next_token_labels(batch["labels"]) != IGNORE).sum(1)
        # Every process sees the sums, and of the rows those that it read.
        sums = loss_sums(prediction, batch, config.loss, jax.random.key(0))
        sums, counts = layout.pin((sums, count_targets(batch, ids, config.loss)))
        rows = {
            "right": (prediction.answers.correct == learned) & (learned > 0),
            "dice": dice_score(masks, truth),
            "dice_valid": prediction.masks_valid & truth.any((-2, -1)),
            "masks": masks,
        }
        return Measured(sums, counts, **jax.lax.with_sharding_constraint(rows, layout.batch))

    return measure


def summarise(
    measured: Iterable[tuple[Measured, tuple[str, ...]]], kinds: Mapping[str, str], config: TrainConfig
) -> dict[str, float]:
    """Means over a validation.

    Args:
        measured: every batch with the names of the samples that this process read; a row without a name is
            padding.
        kinds: task of every sample by name.

    Returns:
        The losses; `dice` over all masks with a truth, and by task; `answers`, the share of samples answered
        right to the last token, by task. Measures of which there is no sample are left out. The same on
        every process.
    """
    sums, counts = None, None
    # Task, whether the answer is right, and the Dice of its masks, by number of the batch and of the row.
    seen: dict[str, tuple[str, bool, list[float]]] = {}
    for number, (batch, names) in enumerate(measured):
        batch_sums, batch_counts = jax.device_get((batch.sums, batch.counts))
        sums = batch_sums if sums is None else jax.tree.map(np.add, sums, batch_sums)
        counts = batch_counts if counts is None else jax.tree.map(np.add, counts, batch_counts)
        parts = (distributed.local_rows(part) for part in (batch.right, batch.dice, batch.dice_valid))
        (rows, right), (_, dice), (_, valid) = parts
        for local, (row, name) in enumerate(zip(rows, names, strict=True)):
            if name:
                scores = dice[local][valid[local]].tolist()
                seen[f"{number}/{row}"] = kinds[name], bool(right[local]), scores
    if sums is None:
        return {}
    values = defaultdict(list)
    everywhere = {place: answer for part in distributed.gather(seen) for place, answer in part.items()}
    for kind, right, dice in everywhere.values():
        values["dice"] += dice
        values[f"dice/{kind}"] += dice
        values[f"answers/{kind}"].append(right)
    losses = {name: float(value) for name, value in mean_losses(sums, counts, config.loss).items()}
    # An exact sum does not depend on the order, which is another with another number of processes.
    return losses | {name: math.fsum(found) / len(found) for name, found in sorted(values.items()) if found}


class Validation:
    """The validation data, measured at every call on the same batches."""

    def __init__(self, config: TrainConfig, data: Pipeline, measure: Callable, layout: Layout, log: RunLog):
        """`measure` is what `build_validation` gives."""
        self.config, self.data, self.measure, self.layout, self.log = config, data, measure, layout, log
        self.kinds = {record.name: str(record.kind) for record in data.mixture.records}

    def __call__(
        self, update: int, state: TrainState, frozen: Parameters, stopping: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Measure, log, and keep a few pictures; None if `stopping` says so meanwhile."""
        settings = self.config.log
        measured, pictures = [], 0
        for number, batch in zip(range(settings.validate_batches), self.data, strict=False):
            if stopping():
                return None
            arrays = self.layout.place_batch(batch.arrays)
            result = self.measure(trained_parameters(state), frozen, arrays)
            if distributed.is_first() and pictures < settings.overlays and batch.arrays["masks"].size:
                _, valid = distributed.local_rows(result.dice_valid)
                _, masks = distributed.local_rows(result.masks)
                shown = np.flatnonzero(valid[:, 0, 0])[: settings.overlays - pictures]
                for row in shown:
                    picture = mask_picture(
                        batch.arrays["sam_pixels"][row, 0],
                        batch.arrays["masks"][row, 0, 0] > 0,
                        masks[row, 0, 0],
                    )
                    self.log.picture(update, f"{number}-{row}", picture)
                pictures += len(shown)
            measured.append((result._replace(masks=None), batch.names))
        measures = summarise(measured, self.kinds, self.config)
        self.log.write(update, "validation", measures)
        return measures


def is_best(checkpointer: Checkpointer, config: TrainConfig, measures: dict[str, float] | None) -> bool:
    """Whether a state with these measures should be kept as the best so far."""
    name = config.checkpoint.best
    if measures is None or name not in measures or not config.checkpoint.keep_best:
        return False
    checkpointer.wait()

    def better() -> bool:
        best = checkpointer.best()
        return best is None or measures[name] > checkpointer.measures(best)[name]

    return distributed.first_says(better)
