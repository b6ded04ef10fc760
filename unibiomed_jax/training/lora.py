"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): attach them, and hand them to peft."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from unibiomed_jax.models.layers import Linear, Lora, stack_layers
from unibiomed_jax.training.parameters import Parameters, matches, require_matches

DECODER = "language_model.layers."
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


def save_peft_adapter(
    directory: str | os.PathLike, parameters: Parameters, *, rank: int, alpha: float, dropout: float
) -> None:
    """Write the adapters of the decoder as a folder that peft's PeftModel.from_pretrained loads.

    The base model there is the language model alone (transformers' Qwen2ForCausalLM); adapters of other parts
    are left out.
    """
    tensors, modules = {}, set()
    for path, value in parameters.items():
        if not (path.startswith(DECODER) and ".lora." in path):
            continue
        layer, _, name = path.removeprefix(DECODER).partition(".lora.")
        modules.add(layer.rpartition(".")[2])
        for index, matrix in enumerate(np.asarray(jax.device_get(value), np.float32)):
            key = f"base_model.model.model.layers.{index}.{layer}.lora_{name.upper()}.weight"
            tensors[key] = np.ascontiguousarray(matrix.T)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors.part", metadata={"format": "pt"})
    os.replace(directory / "adapter_model.safetensors.part", directory / "adapter_model.safetensors")
    part = directory / "adapter_config.json.part"
    part.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(part, directory / "adapter_config.json")
