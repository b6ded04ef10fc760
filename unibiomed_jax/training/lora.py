"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on linear layers."""

from __future__ import annotations

from collections.abc import Iterable

from flax import nnx

from unibiomed_jax.conversion.peft import DECODER
from unibiomed_jax.models.layers import Linear, Lora, stack_layers
from unibiomed_jax.parameters import matches, require_matches

# The linear layers of every decoder block, as the reference adapts them.
DECODER_LAYERS = tuple(
    f"{DECODER}{name}"
    for name in (
        *(f"self_attn.{projection}_proj" for projection in "qkvo"),
        *(f"mlp.{projection}_proj" for projection in ("gate", "up", "down")),
    )
)


def linear_layers(model: nnx.Module) -> dict[str, Linear]:
    """All linear layers of a model by dotted path."""
    return {
        ".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, Linear)
    }


def attach(
    model: nnx.Module, targets: Iterable[str], *, rank: int, alpha: float, dropout: float, rngs: nnx.Rngs
) -> None:
    """Give the linear layers that `targets` describe by path an adapter of scale alpha / rank, in place.

    A starts Kaiming-uniform and B at zero, so that the model computes what it did before.

    Raises:
        InputError: a target describes no linear layer.
    """
    layers = linear_layers(model)
    require_matches(targets, layers, "the adapter's targets")
    for path, layer in layers.items():
        if not matches(path, targets):
            continue
        *stack, features_in, features_out = layer.kernel.get_value().shape

        def make(rngs, features_in=features_in, features_out=features_out):
            return Lora(features_in, features_out, rank, alpha / rank, dropout, rngs)

        layer.lora = stack_layers(make, stack[0], rngs) if stack else make(rngs)
