"""Linear layers for decoding on a CPU, where a token costs one pass over the weights.

The released language model is stored in bfloat16. Read as it is stored it is half the bytes of float32, and a
CPU with bfloat16 matrix units multiplies it fast, but only as the left operand and row by row of the output.
Activations stay float32: split into three bfloat16 numbers they lose nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, BFloat16, Float32

from unibiomed_jax.models.layers import Linear
from unibiomed_jax.models.ops import row_major
from unibiomed_jax.models.qwen2 import Qwen2

PARTS = 3
# With more rows (a prompt) arithmetic costs more than reading the weights: plain float32 is as fast then.
MAX_SPLIT_ROWS = 16


def split(x: Float32[Array, "rows in"]) -> BFloat16[Array, "in parts*rows"]:
    """Columns of bfloat16 whose sum over the parts is x to 24 bits, its whole float32 mantissa."""
    parts = []
    for _ in range(PARTS):
        # A plain cast there and back would be optimised away.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part)
        x = x - part
    return row_major(jnp.concatenate(parts).T.astype(jnp.bfloat16))


class SplitLinear(nnx.Module):
    """`Linear` with a bfloat16 kernel stored as (out, in) and float32 input, equal to float32 arithmetic."""

    def __init__(self, linear: Linear):
        self.kernel = nnx.Param(linear.kernel[...].T.astype(jnp.bfloat16))
        self.bias = linear.bias

    def __call__(self, x: Float32[Array, "*batch in"], key: None = None) -> Float32[Array, "*batch out"]:
        """`key` is there because `Linear` takes one; this layer is for inference only."""
        kernel = self.kernel[...]
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > MAX_SPLIT_ROWS:
            y = rows @ kernel.astype(jnp.float32).T
        else:
            y = jnp.matmul(kernel, split(rows), preferred_element_type=jnp.float32)
            y = y.reshape(-1, PARTS, len(rows)).sum(1).T
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def stored_in_bfloat16(params: dict) -> bool:
    """Whether all matrices of a parameter tree came in bfloat16, as those of the release do."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return all(
        leaf.dtype == jnp.bfloat16 for path, leaf in leaves if path[-1].key in ("kernel", "embed_tokens")
    )


def split_linears(model: Qwen2) -> None:
    """Replace every linear layer of a language model (its layers a list) by a `SplitLinear`, in place."""
    for layer in model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(vars(block).items()):
                if isinstance(child, Linear):
                    setattr(block, name, SplitLinear(child))
    if model.lm_head is not None:
        model.lm_head = SplitLinear(model.lm_head)
