"""How well a mask fits the truth."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def dice_score(
    predicted: Bool[Array, "*batch rows columns"], truth: Bool[Array, "*batch rows columns"]
) -> Float[Array, "*batch"]:
    """2 |P and T| / (|P| + |T|); 1 if both are empty."""
    both = (predicted & truth).sum((-2, -1))
    total = predicted.sum((-2, -1)) + truth.sum((-2, -1))
    return jnp.where(total > 0, 2 * both / jnp.maximum(total, 1), 1.0)
