"""The few building blocks all parts share.

Compute dtype follows the activations: a component casts its input once, and what a layer returns has the
dtype of what it took. A linear layer multiplies in bfloat16 where its input or its stored kernel is bfloat16,
and in float32 else, always accumulating in float32. Norms compute in float32 whatever flows in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unibiomed_jax.sharding.constraints import gathered, gathers_layers

LINEAR_INIT = nnx.initializers.normal(0.02)


def one_pass(x: Float[Array, "..."]) -> jax.lax.Precision | None:
    """Products of bfloat16 need one pass; of float32, what `jax.default_matmul_precision` says."""
    return jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else None


@jax.custom_vjp
def matmul(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """x @ kernel, accumulated and returned in float32, with gradients in the operands' dtypes.

    Automatic differentiation would multiply the float32 cotangent with a bfloat16 operand, which is slow
    everywhere; and a bfloat16 result is a slow path of XLA on a CPU.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32, precision=one_pass(x))


def _matmul_forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, g):
    x, kernel = residuals
    g = g.astype(x.dtype)
    precision = {"preferred_element_type": jnp.float32, "precision": one_pass(x)}
    dx = jnp.matmul(g, kernel.T, **precision).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))  # not made one axis, as several of them may be divided over devices
    dkernel = jax.lax.dot_general(x, g, ((rows, rows), ((), ())), **precision)
    return dx, dkernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(formula: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays as `matmul` multiplies: accumulated and returned in float32, with gradients
    in the operands' dtype. Every letter of the formula stands in two of its three parts, or in all.
    """
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32, precision=one_pass(x))


def _einsum_forward(formula, x, y):
    return einsum(formula, x, y), (x, y)


def _einsum_backward(formula, residuals, g):
    x, y = residuals
    operands, result = formula.split("->")
    left, right = operands.split(",")
    g = g.astype(x.dtype)
    dx, dy = einsum(f"{result},{right}->{left}", g, y), einsum(f"{result},{left}->{right}", g, x)
    return dx.astype(x.dtype), dy.astype(y.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)


class Lora(nnx.Module):
    """Low-rank update of a linear layer: y += scale * dropout(x) A B (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, rngs: nnx.Rngs
    ):
        uniform = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform"
        )  # Kaiming-uniform, a = sqrt(5)
        self.a = nnx.Param(uniform(rngs.params(), (in_features, rank), jnp.float32))
        self.b = nnx.Param(jnp.zeros((rank, out_features), jnp.float32))
        self.scale = scale
        self.dropout = dropout

    def __call__(self, x: Float[Array, "... in"], key: Array | None) -> Float[Array, "... out"]:
        if key is not None and self.dropout:
            # A TPU's compiler would draw the bits inside of the product, which it takes a minute to compile.
            keep = jax.lax.optimization_barrier(jax.random.bernoulli(key, 1 - self.dropout, x.shape))
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        down = matmul(x, self.a[...].astype(x.dtype)).astype(x.dtype)
        return self.scale * matmul(down, self.b[...].astype(x.dtype))


class Linear(nnx.Module):
    """Affine map of the last axis, equal to torch.nn.Linear with its weight transposed.

    `lora` is None until an adapter is attached; `key` switches on the adapter's dropout.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(LINEAR_INIT(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        self.lora: Lora | None = nnx.data(None)

    def __call__(self, x: Float[Array, "... in"], key: Array | None = None) -> Float[Array, "... out"]:
        kernel = self.kernel[...]
        operand = jnp.bfloat16 if jnp.bfloat16 in (x.dtype, kernel.dtype) else x.dtype
        y = matmul(x.astype(operand), kernel.astype(operand))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        if self.lora is not None:
            y = y + self.lora(x, key)
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with the two-pass variance of torch.nn.LayerNorm, in float32.

    Over NHWC feature maps this is also SAM2's LayerNorm2d.
    """

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm as in Qwen2: normalise in float32, round to x's dtype, then scale."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


class Conv2d(nnx.Module):
    """2-D convolution of NHWC maps, equal to torch.nn.Conv2d with its weight as HWIO.

    `padding` pixels of zeros are added on every side, as torch counts them ("SAME" would pad differently
    at stride 2 and 4).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, in_features, out_features)
        self.kernel = nnx.Param(LINEAR_INIT(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32))
        self.stride, self.padding = stride, padding

    def __call__(self, x: Float[Array, "batch rows columns in"]) -> Float[Array, "batch rows2 columns2 out"]:
        kernel = self.kernel[...].astype(x.dtype)
        if kernel.shape[:2] == (1, 1) and self.stride == 1:
            return (matmul(x, kernel[0, 0]) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=one_pass(x),
        )
        return y + self.bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """Linear layers with an activation between them and none at the end."""

    def __init__(self, dims: tuple[int, ...], activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        self.layers = nnx.List([Linear(i, o, rngs=rngs) for i, o in zip(dims[:-1], dims[1:], strict=True)])
        self.activation = activation

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
    """`length` modules of one kind as a single module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make_all(rngs):
        return make(rngs)

    return make_all(rngs)


def unstack_layers(layers: nnx.Module) -> nnx.List:
    """Turn a stack into a list of single layers (decoding on a CPU must not slice the stack every token)."""
    graphdef, state = nnx.split(layers)
    length = jax.tree.leaves(state)[0].shape[0]
    return nnx.List([nnx.merge(graphdef, layer_at(state, i)) for i in range(length)])


def layer_at(stacked: Any, index: int) -> Any:
    """Entry `index` of the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


# The name of what a kernel of attention gives, and needs again on the way back.
KERNEL_OUTPUT = "attention"

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KERNEL_OUTPUT),
    ),
}


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that keeps what is computed, but no weights as they were gathered and converted.

    Weights that do not train are gathered by a call whose own rule of gradients is not asked for.
    """
    return primitive.name not in ("sharding_constraint", "custom_vjp_call", "convert_element_type")


def scan_layers(
    layers: nnx.Module | nnx.List,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    path: str,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Run `carry, y = step(layer, carry, x)` over all layers; return the last carry and the stacked ys.

    A stack is scanned, so that compile time and compiler memory stay flat in depth; a list is unrolled.
    `path` is where the layers lie in the model: each is gathered where parameters are stored in shares.
    `remat` names a rematerialisation policy for the backward pass: "none", "full" or "dots".
    """
    if isinstance(layers, nnx.List):
        ys = []
        for i, layer in enumerate(layers):
            graphdef, state = nnx.split(layer)
            layer = nnx.merge(graphdef, gathered(path, state))
            carry, y = step(layer, carry, layer_at(xs, i))
            ys.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

    graphdef, state = nnx.split(layers)

    def body(carry, inputs):
        layer_state, x = inputs
        return step(nnx.merge(graphdef, gathered(path, layer_state)), carry, x)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    elif gathers_layers():
        body = jax.checkpoint(body, policy=_all_but_gathered, prevent_cse=False)
    return jax.lax.scan(body, carry, (state, xs))
