"""One update of the parameters: pure functions over plain trees, compiled once for every shape of a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from unibiomed_jax.parameters import Parameters, merge
from unibiomed_jax.sharding.constraints import from_optimizer, gather_unstacked
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training.config import TrainConfig
from unibiomed_jax.training.forward import (
    MASK_LOSSES,
    Arrays,
    LossCounts,
    LossSums,
    TokenIds,
    answer_batch,
    count_targets,
    empty_sums,
    loss_sums,
    mean_losses,
)
from unibiomed_jax.training.optimizer import adamw, learning_rate

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that an update changes; with the data position, all that a run needs to go on to the bit."""

    # Updates tried so far; random numbers are derived from it.
    step: Int[Array, ""]
    # Float32 masters of what trains.
    trainable: Parameters
    # State of the optimiser.
    moments: Any
    # Running average of `trainable`, if the run keeps one.
    average: Parameters | None
    # Updates in a row that were not applied because loss, gradient or direction was not finite.
    bad_steps: Int[Array, ""]
    # Root of all random numbers; never changes.
    key: Array


def trained_parameters(state: TrainState) -> Parameters:
    """What the run is for: the running average where there is one."""
    return state.trainable if state.average is None else state.average


def init_state(trainable: Parameters, config: TrainConfig) -> TrainState:
    """The state before the first update."""
    trainable = {path: value.astype(jnp.float32) for path, value in trainable.items()}
    average = jax.tree.map(jnp.copy, trainable) if config.optim.ema is not None else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        moments=adamw(config.optim).init(trainable),
        average=average,
        bad_steps=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(config.seed)),
    )


def gradients(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    ids: TokenIds,
    state: TrainState,
    frozen: Parameters,
    batch: Arrays,
    counts: LossCounts,
    index: Int[Array, ""] | int,
) -> tuple[Parameters, LossSums]:
    """Gradients of one batch's share of the loss of an update, and its sums.

    `counts` are those of all batches of the update together and `index` says which of them this one is, so
    that shares add up to exactly the gradient of one large batch.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    dropout_key, points_key = jax.random.split(jax.random.fold_in(key, index))

    def share(trainable):
        trainable = gather_unstacked(from_optimizer(trainable))
        prediction = answer_batch(
            merge(graphdef, trainable, gather_unstacked(frozen)),
            batch,
            ids,
            token_chunk=config.loss.token_chunk,
            follow=config.loss.follow,
            remat=config.remat,
            dropout_key=dropout_key,
        )
        sums = loss_sums(prediction, batch, config.loss, points_key)
        losses = mean_losses(sums, counts, config.loss)
        masks = sum(losses[name] for name in MASK_LOSSES)
        others = sum(losses[name] for name in losses if name not in ("loss", *MASK_LOSSES))
        return others + jnp.where(state.step < config.loss.masks_from, 0, masks), sums

    with jax.default_matmul_precision("highest"):  # for what the policy computes in float32
        return jax.grad(share, has_aux=True)(state.trainable)


def update(
    config: TrainConfig, state: TrainState, grads: Parameters, sums: LossSums, counts: LossCounts
) -> tuple[TrainState, Metrics]:
    """Apply the gradients.

    If the loss, the gradient norm or the norm of the update is not finite, only the counters change.
    """
    losses = mean_losses(sums, counts, config.loss)
    norm = optax.global_norm(grads)
    rate = learning_rate(config.optim, state.step)
    direction, moments = adamw(config.optim).update(grads, state.moments, state.trainable)
    finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(direction))
    trainable = jax.tree.map(lambda p, d: p - rate * d, state.trainable, direction)
    average = state.average
    if average is not None:
        decay = config.optim.ema
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, trainable)

    old = (state.trainable, state.moments, state.average)
    trainable, moments, average = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (trainable, moments, average), old
    )
    state = TrainState(
        step=state.step + 1,
        trainable=trainable,
        moments=moments,
        average=average,
        bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
        key=state.key,
    )
    metrics = losses | {
        "learning_rate": rate,
        "gradient_norm": norm,
        "bad_steps": state.bad_steps,
        "tokens": counts.tokens,
        "masks": counts.masks,
    }
    return state, metrics


class TrainStep:
    """The compiled update: `state, metrics = step(state, frozen, batches)`; the old state is given up.

    The batches of an update may differ in shape. With one batch everything is one program; with several,
    their gradients are summed one after the other and then applied.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: TrainConfig,
        ids: TokenIds,
        layout: Layout,
    ):
        pin = functools.partial(layout.pin, use="optimizer")

        def whole(state, frozen, batch):
            counts = count_targets(batch, ids, config.loss)
            grads, sums = gradients(graphdef, config, ids, state, frozen, batch, counts, 0)
            state, metrics = update(config, state, pin(grads), sums, counts)
            return pin(state), metrics

        def accumulate(total, state, frozen, batch, counts, index):
            share = gradients(graphdef, config, ids, state, frozen, batch, counts, index)
            return pin(jax.tree.map(jnp.add, total, share))

        def finish(state, total, counts):
            state, metrics = update(config, state, *total, counts)
            return pin(state), metrics

        def nothing(trainable):
            return pin((jax.tree.map(jnp.zeros_like, trainable), empty_sums()))

        self.whole = layout.jit(whole, donate_argnums=0)
        self.accumulate = layout.jit(accumulate, donate_argnums=0)
        self.finish = layout.jit(finish, donate_argnums=0)
        self.count = layout.jit(lambda batch: count_targets(batch, ids, config.loss))
        self.nothing = layout.jit(nothing)

    def __call__(
        self, state: TrainState, frozen: Parameters, batches: Sequence[Arrays]
    ) -> tuple[TrainState, Metrics]:
        if len(batches) == 1:
            return self.whole(state, frozen, batches[0])
        counts = jax.tree.map(lambda *parts: sum(parts), *map(self.count, batches))
        total = self.nothing(state.trainable)
        for index, batch in enumerate(batches):
            total = self.accumulate(total, state, frozen, batch, counts, jnp.int32(index))
        return self.finish(state, total, counts)
