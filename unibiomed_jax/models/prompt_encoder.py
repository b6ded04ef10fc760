"""SAM's prompt encoder, as far as a language prompt needs it.

No clicks, boxes or masks are ever given; their embeddings exist because checkpoints carry them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unibiomed_jax.models.layers import LINEAR_INIT, Conv2d, LayerNorm


class MaskDownscaling(nnx.Module):
    """Weights of the encoder of mask prompts (never called)."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv2d(1, 4, 2, stride=2, rngs=rngs)
        self.norm1 = LayerNorm(4, eps=1e-6)
        self.conv2 = Conv2d(4, 16, 2, stride=2, rngs=rngs)
        self.norm2 = LayerNorm(16, eps=1e-6)
        self.conv3 = Conv2d(16, d_model, 1, rngs=rngs)


class PromptEncoder(nnx.Module):
    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1.0)
        self.positional_encoding_gaussian_matrix = nnx.Param(normal(rngs.params(), (2, d_model // 2)))
        self.point_embeddings = nnx.Param(LINEAR_INIT(rngs.params(), (4, d_model)))
        self.not_a_point_embed = nnx.Param(LINEAR_INIT(rngs.params(), (d_model,)))
        self.no_mask_embed = nnx.Param(LINEAR_INIT(rngs.params(), (d_model,)))
        self.mask_downscaling = MaskDownscaling(d_model, rngs=rngs)

    def sparse_prompt(
        self, language: Float[Array, "images objects d_model"] | None, shape: tuple[int, int]
    ) -> Float[Array, "images objects prompts d_model"]:
        """Prompt tokens for `shape` = (images, objects): two empty points, then the language vector if any.

        SAM2 is called with one dummy point and pads it with another one because there is no box; both become
        exactly `not_a_point_embed`.
        """
        empty = jnp.broadcast_to(self.not_a_point_embed[...], (*shape, 2, self.not_a_point_embed.shape[0]))
        if language is None:
            return empty
        return jnp.concatenate([empty.astype(language.dtype), language[:, :, None]], axis=2)

    def dense_position(self, grid: int, bfloat16: bool) -> Float[Array, "cells d_model"]:
        """Random Fourier features (Tancik et al. 2020) of the cell centres, row-major, in float32.

        `bfloat16` rounds after every operation as torch does on bfloat16 tensors. The released weights were
        trained with that rounding, which moves single entries by up to 0.14. `reduce_precision` survives
        compilation; XLA may drop a cast to bfloat16 and back.

        The matrix is a fixed random draw: no gradient reaches it.
        """

        def rounded(x):
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if bfloat16 else x

        matrix = rounded(
            jax.lax.stop_gradient(self.positional_encoding_gaussian_matrix[...]).astype(jnp.float32)
        )
        centres = (2 * np.arange(grid) + 1) / grid - 1
        rows, columns = np.meshgrid(centres, centres, indexing="ij")
        x, y = (rounded(c.reshape(-1, 1).astype(np.float32)) for c in (columns, rows))
        angles = rounded(rounded(x * matrix[0] + y * matrix[1]) * np.float32(2 * np.pi))
        return rounded(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
