"""Linear layers of the language model on a CPU, from weights as they are stored: in bfloat16.

A token that is decoded costs one pass over the weights, and in bfloat16 they are half the bytes. A prompt
costs arithmetic, of which a CPU with bfloat16 matrix units does five times as much as in float32. Activations
stay float32: each goes through those units as a sum of bfloat16 numbers. Vector units do only twice as much:
with them float32 weights are faster, for prompts and for tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32

from unibiomed_jax.models.attention import row_major
from unibiomed_jax.models.layers import Linear
from unibiomed_jax.models.qwen2 import Qwen2

# Up to this many rows, reading the weights is what a product costs.
MAX_DECODE_ROWS = 16
# Parts that hold the whole mantissa of float32. For a few rows they cost nothing: more columns for the same
# pass over the weights.
EXACT_PARTS = 3
# 16 bits of the mantissa, an error below 1e-5. For many rows each part is a product of its own: one would be
# as coarse as bfloat16 activations, three leave half of what is gained over float32.
FAST_PARTS = 2


def bfloat16_parts(x: Float32[Array, "rows in"], parts: int) -> list[Float32[Array, "rows in"]]:
    """Numbers of bfloat16 precision whose sum is the first 8 * parts bits of x, coarsest first."""
    numbers = []
    for _ in range(parts):
        # A plain cast there and back would be optimised away.
        numbers.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - numbers[-1]
    return numbers


class SplitLinear(nnx.Module):
    """`Linear` with a bfloat16 kernel stored as (out, in) and float32 input.

    Equal to float32 arithmetic for a few rows, as decoding has them; of many the first 8 * `prompt_parts`
    bits count. The products are written in the two forms that XLA runs on the matrix units without moving the
    kernel.
    """

    def __init__(self, linear: Linear, prompt_parts: int = FAST_PARTS):
        self.prompt_parts = prompt_parts
        self.kernel = nnx.Param(linear.kernel[...].T.astype(jnp.bfloat16))
        self.bias = linear.bias

    def __call__(self, x: Float32[Array, "*batch in"], key: None = None) -> Float32[Array, "*batch out"]:
        """`key` is there because `Linear` takes one; this layer is for inference only."""
        kernel = self.kernel[...]
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if count > MAX_DECODE_ROWS:
            stacked = jnp.concatenate(bfloat16_parts(rows, self.prompt_parts)).astype(jnp.bfloat16)
            last_axes = (((1,), (1,)), ((), ()))
            y = jax.lax.dot_general(stacked, kernel, last_axes, preferred_element_type=jnp.float32)
            y = y.reshape(self.prompt_parts, count, -1).sum(0)
        else:
            columns = row_major(jnp.concatenate(bfloat16_parts(rows, EXACT_PARTS)).T.astype(jnp.bfloat16))
            y = jnp.matmul(kernel, columns, preferred_element_type=jnp.float32)
            y = y.reshape(-1, EXACT_PARTS, count).sum(1).T
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def stored_in_bfloat16(params: dict) -> bool:
    """Whether all matrices of a parameter tree came in bfloat16, as those of the release do."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return all(
        leaf.dtype == jnp.bfloat16 for path, leaf in leaves if path[-1].key in ("kernel", "embed_tokens")
    )


def split_linears(model: Qwen2, *, exact: bool = False) -> None:
    """Replace every linear layer of a language model (its layers a list) by a `SplitLinear`, in place.

    `exact` reads prompts, too, with all bits of float32.
    """
    parts = EXACT_PARTS if exact else FAST_PARTS
    for layer in model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(vars(block).items()):
                if isinstance(child, Linear):
                    setattr(block, name, SplitLinear(child, parts))
    if model.lm_head is not None:
        model.lm_head = SplitLinear(model.lm_head, parts)
