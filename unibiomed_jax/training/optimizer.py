"""AdamW with the reference's schedule, as pure functions over flat tables of parameters."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from unibiomed_jax.training.config import OptimConfig


def learning_rate(config: OptimConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine that ends at 0.

    The reference's schedule advances with every accumulated batch, and an update uses the value of its last
    one; counted that way, b warm-up batches of e in all and t the batch:
    lr * (s + (1 - s) t / (b - 1)) for t < b, else lr * (1 + cos(pi (t - b) / (e - b))) / 2.
    """
    total = config.steps * config.accumulate
    warmup = int(config.warmup * total)
    batch = jnp.asarray(step) * config.accumulate + config.accumulate - 1
    rise = config.warmup_start + (1 - config.warmup_start) * batch / max(warmup - 1, 1)
    # sin² of the way still to go keeps its precision near the end, where 1 + cos cancels.
    left = jnp.clip(total - batch, 0) / (total - warmup)
    fall = jnp.sin(jnp.pi / 2 * left) ** 2
    return config.lr * jnp.where(batch < warmup, rise, fall)


def adamw(config: OptimConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam's direction, plus decay; the caller multiplies by the learning rate.

    Equals torch.optim.AdamW: p -= lr * (m / (sqrt(v) + eps) + decay * p) with bias-corrected moments.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay),
    )
