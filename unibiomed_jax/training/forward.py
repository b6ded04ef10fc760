"""A batch of arrays through the model, and its losses as sums."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unibiomed_jax.config.model import NO_REMAT, RematConfig
from unibiomed_jax.models.unibiomed import UniBiomedModel, visual_source
from unibiomed_jax.training.config import LossConfig
from unibiomed_jax.training.losses import (
    IGNORE,
    MASK_EPS,
    TokenLoss,
    choose_points,
    cyclic_copies,
    mask_losses,
    next_token_labels,
    sample_bilinear,
    token_cross_entropy,
)

# Names and shapes of a batch; B samples, T tokens, O object slots, F frame slots, S and M the sides of SAM2's
# image and of its masks (S / 4). Valid tiles, frames and objects come first in their row.
#   pixel_values (B, tiles, side, side, 3)   bytes
#   input_ids, labels (B, T)                 label -100: not learned; labels are not shifted
#   sam_pixels (B, F, S, S, 3)               bytes
#   masks (B, O, F, M, M)                    0 or 1
#   object_valid (B, O), frame_valid (B, F)  bool
Arrays = dict[str, Array]


class TokenIds(NamedTuple):
    """Ids of the two tokens that mean more than text; the tokenizer knows them."""

    # Stands for one visual token.
    image: int
    # Asks for a mask.
    seg: int


class Prediction(NamedTuple):
    """What the model says about a batch, with the true answers as input."""

    answers: TokenLoss
    # Logits of the mask with the highest predicted IoU.
    masks: Float[Array, "batch objects frames M M"]
    # Where there is a [SEG] and a true mask.
    masks_valid: Bool[Array, "batch objects frames"]


class LossSums(NamedTuple):
    """Sums over a batch; they add up over batches."""

    tokens: Float[Array, ""]
    masks: Float[Array, ""]
    dice: Float[Array, ""]


# Losses of masks, by their names in `mean_losses`: they wait for `LossConfig.masks_from`.
MASK_LOSSES = ("loss_mask", "loss_dice")


class LossCounts(NamedTuple):
    """What the sums are divided by; known from the batch alone, before any model runs."""

    tokens: Int[Array, ""]
    masks: Int[Array, ""]


def answer_batch(
    model: UniBiomedModel,
    batch: Arrays,
    ids: TokenIds,
    *,
    token_chunk: int = 256,
    follow: bool = False,
    remat: RematConfig = NO_REMAT,
    dropout_key: Array | None = None,
) -> Prediction:
    """Run the whole model on a batch with the true answers as input; object slot k takes the k-th [SEG].

    See `UniBiomedModel.__call__` for the options.
    """
    tokens, objects = batch["input_ids"], batch["object_valid"].shape[1]
    forward = model(
        batch["pixel_values"],
        tokens,
        visual_source(tokens, ids.image),
        batch["sam_pixels"],
        jnp.argsort(tokens != ids.seg, axis=1, stable=True)[:, :objects],
        follow=follow,
        remat=remat,
        dropout_key=dropout_key,
    )
    answers = token_cross_entropy(
        forward.hidden,
        model.language_model.head(),
        batch["labels"],
        vocab_size=model.config.language.vocab_size,
        chunk=token_chunk,
    )
    return Prediction(answers, forward.masks, masks_to_learn(batch, ids))


def masks_to_learn(batch: Arrays, ids: TokenIds) -> Bool[Array, "batch objects frames"]:
    """Object slots that have both a true mask and a [SEG], in the frames that exist."""
    slots = jnp.arange(batch["object_valid"].shape[1])
    said = slots < (batch["input_ids"] == ids.seg).sum(1, keepdims=True)
    return (batch["object_valid"] & said)[:, :, None] & batch["frame_valid"][:, None, :]


def count_targets(batch: Arrays, ids: TokenIds, config: LossConfig) -> LossCounts:
    """How many tokens and mask rows the losses of a batch sum over."""
    tokens = (next_token_labels(batch["labels"]) != IGNORE).sum()
    valid = masks_to_learn(batch, ids)
    if config.copies is not None:
        return LossCounts(tokens, config.copies * valid.any(1).sum())
    return LossCounts(tokens, valid.sum())


def loss_sums(
    prediction: Prediction,
    batch: Arrays,
    config: LossConfig,
    key: Array,
    points: Float[Array, "masks points 2"] | None = None,
) -> LossSums:
    """Sums of the three losses; mask rows are ordered by sample, frame and object.

    `points` replaces the random sampling points: the way to compare with numbers of another implementation.
    """
    answers = prediction.answers
    logits, targets = prediction.masks, batch["masks"].astype(jnp.float32)
    valid = prediction.masks_valid
    if config.copies is not None:
        key_objects = jax.random.fold_in(key, 2)  # `choose_points` splits the key in two
        index, _ = cyclic_copies(valid.any(2), config.copies, key_objects)
        logits, targets, valid = (
            jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
            for x in (logits, targets, valid)
        )
    logits, targets, valid = (x.swapaxes(1, 2) for x in (logits, targets, valid))
    side = logits.shape[-1]
    logits, targets = logits.reshape(-1, side, side), targets.reshape(-1, side, side)
    nothing = jnp.zeros(())
    masks = dice = nothing
    if len(logits):
        if points is None:
            points = choose_points(
                logits,
                key,
                num_points=config.num_points,
                oversample=config.oversample,
                importance=config.importance,
            )
        masks, dice = mask_losses(
            sample_bilinear(logits, points), sample_bilinear(targets, points), valid.reshape(-1)
        )
    return LossSums(answers.cross_entropy.sum(), masks, dice)


def empty_sums() -> LossSums:
    """The neutral element of adding sums."""
    return LossSums(*(jnp.zeros(()) for _ in LossSums._fields))


def mean_losses(sums: LossSums, counts: LossCounts, config: LossConfig) -> dict[str, Float[Array, ""]]:
    """The three weighted losses and their sum, as the reference reports them."""
    losses = {
        "loss_tokens": sums.tokens / jnp.maximum(counts.tokens, 1),
        "loss_mask": config.mask_weight * sums.masks / (counts.masks * config.num_points + MASK_EPS),
        "loss_dice": config.dice_weight * sums.dice / (counts.masks + MASK_EPS),
    }
    return {"loss": sum(losses.values()), **losses}
