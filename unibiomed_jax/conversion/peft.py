"""Low-rank adapters as peft reads them."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
from safetensors.numpy import save

from unibiomed_jax.files import locate, write_beside
from unibiomed_jax.parameters import Parameters

DECODER = "language_model.layers."


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
    directory = locate(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_beside(directory / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_beside(directory / "adapter_config.json", (json.dumps(settings, indent=2) + "\n").encode())
