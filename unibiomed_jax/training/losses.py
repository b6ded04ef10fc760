"""The training losses as sums and counts, so that accumulated batches add up and divide once.

Token cross-entropy, and the two mask losses at sampled points of PointRend (Kirillov et al. 2020,
arXiv 1912.08193) as Mask2Former uses them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unibiomed_jax.data.transforms import IGNORE
from unibiomed_jax.models.layers import matmul
from unibiomed_jax.parameters import HEAD
from unibiomed_jax.sharding.constraints import by_share
from unibiomed_jax.sharding.target import target

# Added to every denominator of the mask losses by the reference: its own epsilon and float32's.
MASK_EPS = 1e-4 + float(np.finfo(np.float32).eps)


class TokenLoss(NamedTuple):
    """Per row: cross-entropy summed over its learned tokens, and how many were predicted right."""

    cross_entropy: Float[Array, " batch"]
    correct: Int[Array, " batch"]


class MaskLoss(NamedTuple):
    """Sums over valid masks: cross-entropy of all points, and the dice distances."""

    cross_entropy: Float[Array, ""]
    dice: Float[Array, ""]


def next_token_labels(labels: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
    """The label every position predicts: that of the token after it; nothing at the last position."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def token_cross_entropy(
    hidden: Float[Array, "batch tokens embed"],
    head: Float[Array, "embed padded_vocab"],
    labels: Int[Array, "batch tokens"],
    *,
    vocab_size: int,
    chunk: int = 256,
) -> TokenLoss:
    """Cross-entropy of the next token without ever holding the logits of all positions.

    Learned positions are moved to the front of their row and the row is worked off `chunk` positions at a
    time; chunks that hold no learned position in any row are left out, and the logits of a chunk are computed
    again in the backward pass. Columns of the head beyond `vocab_size` are padding and get no probability.

    Equals torch.nn.functional.cross_entropy on shifted logits, ignore_index -100, summed within each row.
    """
    batch, tokens, _ = hidden.shape
    targets = next_token_labels(labels)
    order = jnp.argsort(targets == IGNORE, axis=1, stable=True)
    targets = jnp.take_along_axis(targets, order, axis=1)
    hidden = jnp.take_along_axis(hidden, order[:, :, None], axis=1)

    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORE)
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = targets.reshape(batch, -1, chunk).swapaxes(0, 1)
    hidden = hidden.reshape(batch, -1, chunk, hidden.shape[-1]).swapaxes(0, 1)

    def work_off(head, hidden, targets):
        return _learned_chunks(vocab_size, head, hidden, targets)

    meanings = (None, "batch", "language.tokens")
    loss, correct = by_share(work_off, HEAD, head, hidden, targets, meanings=meanings)
    return TokenLoss(loss.sum((0, 2)), correct.sum((0, 2)))


def _chunk_logits(
    vocab_size: int, head: Float[Array, "embed padded_vocab"], hidden: Float[Array, "batch chunk embed"]
) -> Float[Array, "batch chunk padded_vocab"]:
    logits = matmul(hidden, head.astype(hidden.dtype))
    return jnp.where(jnp.arange(head.shape[1]) < vocab_size, logits, -jnp.inf)


def _occupied(targets: Int[Array, "chunks batch chunk"]) -> Int[Array, ""]:
    """How many chunks hold a learned position: the first ones."""
    return jnp.any(targets != IGNORE, axis=(1, 2)).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _learned_chunks(
    vocab_size: int,
    head: Float[Array, "embed padded_vocab"],
    hidden: Float[Array, "chunks batch chunk embed"],
    targets: Int[Array, "chunks batch chunk"],
) -> tuple[Float[Array, "chunks batch chunk"], Bool[Array, "chunks batch chunk"]]:
    """Cross-entropy of every position and whether it was predicted right, for the chunks that are occupied.

    Its gradient is written out, because automatic differentiation adds up one gradient of the whole head for
    every chunk, the empty ones too: on a TPU a third of the traffic of an update.
    """
    return _learned_chunks_forward(vocab_size, head, hidden, targets)[0]


def _learned_chunks_forward(vocab_size, head, hidden, targets):
    def step(index, results):
        logits, target = _chunk_logits(vocab_size, head, hidden[index]), targets[index]
        learned = target != IGNORE
        # Not an index, which would gather a divided vocabulary.
        chosen = jnp.where(jnp.arange(head.shape[1]) == target[..., None], logits, 0).sum(-1)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        found = (
            jnp.where(learned, normalizer - chosen, 0),
            learned & (jnp.argmax(logits, axis=-1) == target),
            normalizer,
        )
        return jax.tree.map(lambda result, chunk: result.at[index].set(chunk), results, found)

    nothing = jnp.zeros(targets.shape, jnp.float32)
    start = (nothing, jnp.zeros(targets.shape, bool), nothing)
    loss, correct, normalizers = jax.lax.fori_loop(0, _occupied(targets), step, start)
    return (loss, correct), (head, hidden, targets, normalizers)


def _learned_chunks_backward(vocab_size, residuals, cotangents):
    head, hidden, targets, normalizers = residuals
    cotangent = jnp.where(targets != IGNORE, cotangents[0], 0)

    def step(index, gradients):
        head_gradient, hidden_gradient = gradients
        logits, pull = jax.vjp(functools.partial(_chunk_logits, vocab_size), head, hidden[index])
        chosen = jnp.arange(head.shape[1]) == targets[index][..., None]
        probability = jnp.exp(logits - normalizers[index][..., None])
        of_head, of_hidden = pull((probability - chosen) * cotangent[index][..., None])
        return head_gradient + of_head, hidden_gradient.at[index].set(of_hidden)

    start = (jnp.zeros_like(head), jnp.zeros_like(hidden))
    return (*jax.lax.fori_loop(0, _occupied(targets), step, start), None)


_learned_chunks.defvjp(_learned_chunks_forward, _learned_chunks_backward)


def sample_bilinear(
    maps: Float[Array, "masks rows columns"], points: Float[Array, "masks points 2"]
) -> Float[Array, "masks points"]:
    """Read maps at points (x, y) in [0, 1]²; the centre of column j lies at (j + 0.5) / columns.

    Neighbours outside the map count as 0. Equals torch.nn.functional.grid_sample(maps, 2 * points - 1,
    mode="bilinear", padding_mode="zeros", align_corners=False).
    """
    masks, rows, columns = maps.shape
    position = points * jnp.array([columns, rows], points.dtype) - 0.5
    base = jnp.floor(position)
    part = position - base
    column, row = base[..., 0].astype(jnp.int32), base[..., 1].astype(jnp.int32)
    flat = maps.reshape(masks, rows * columns)

    total = 0.0
    for down in (0, 1):
        for right in (0, 1):
            r, c = row + down, column + right
            inside = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
            value = jnp.take_along_axis(flat, jnp.where(inside, r * columns + c, 0), axis=1)
            weight_x = part[..., 0] if right else 1 - part[..., 0]
            weight_y = part[..., 1] if down else 1 - part[..., 1]
            total += jnp.where(inside, value, 0) * weight_x * weight_y
    return total


def choose_points(
    logits: Float[Array, "masks rows columns"],
    key: Array,
    *,
    num_points: int = 12_544,
    oversample: float = 3.0,
    importance: float = 0.75,
) -> Float[Array, "masks points 2"]:
    """Points for the mask losses: mostly where the prediction is least sure, the rest anywhere.

    `oversample` times as many uniform candidates are drawn; of them the `importance` share of `num_points`
    with the smallest |logit| stays, and uniform points fill up. Coordinates are (x, y) in [0, 1)².
    """
    masks = logits.shape[0]
    key_candidates, key_uniform = jax.random.split(key)
    candidates = jax.random.uniform(key_candidates, (masks, int(num_points * oversample), 2))
    certainty = jnp.abs(sample_bilinear(jax.lax.stop_gradient(logits), candidates))
    num_unsure = int(importance * num_points)
    if target().devices == 1:
        _, best = jax.lax.top_k(-certainty, num_unsure)
    else:  # the same; but for `top_k` the compiler gathers the masks of all devices
        best = jnp.argsort(certainty, axis=1, stable=True)[:, :num_unsure]
    chosen = jnp.take_along_axis(candidates, best[..., None], axis=1)
    uniform = jax.random.uniform(key_uniform, (masks, num_points - num_unsure, 2))
    return jnp.concatenate([chosen, uniform], axis=1)


def mask_losses(
    logits: Float[Array, "masks points"],
    targets: Float[Array, "masks points"],
    valid: Bool[Array, " masks"],
) -> MaskLoss:
    """Sigmoid cross-entropy and naive dice distance of sampled points, summed over the valid masks.

    A mask's dice distance is 1 - (2 Σ p t + 1) / (Σ p + Σ t + 1) with p the sigmoid of its logits.
    """
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    cross_entropy = jax.nn.softplus(logits) - logits * targets
    probability = jax.nn.sigmoid(logits)
    overlap = 2 * (probability * targets).sum(1) + 1
    dice = 1 - overlap / (probability.sum(1) + targets.sum(1) + 1)
    return MaskLoss(
        jnp.where(valid, cross_entropy.sum(1), 0).sum(),
        jnp.where(valid, dice, 0).sum(),
    )


def cyclic_copies(
    object_valid: Bool[Array, "batch objects"], copies: int, key: Array
) -> tuple[Int[Array, "batch copies"], Bool[Array, "batch copies"]]:
    """Which object slot each of `copies` rows takes, as the reference does it.

    The valid objects over and over, in order; a random choice of them in a sample that has more than
    `copies`. Valid slots must come first in a row. Rows of a sample without any object are not valid.
    """
    count = object_valid.sum(1, keepdims=True)
    index = jnp.arange(copies) % jnp.maximum(count, 1)
    if object_valid.shape[1] > copies:
        shuffled = jnp.argsort(jnp.where(object_valid, jax.random.uniform(key, object_valid.shape), 1))
        index = jnp.where(count > copies, shuffled[:, :copies], index)
    return index, jnp.broadcast_to(count > 0, (len(count), copies))
