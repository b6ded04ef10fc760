"""What the comparisons share: released weights in torch, random inputs, and our modules compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from unibiomed_jax.conversion.reading import Tensor

Arrays = dict[str, np.ndarray]


class TorchWeights:
    """Released tensors as float32 torch tensors."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.tensors[name].read(), np.float32))

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): self[name] for name in self.tensors if name.startswith(prefix)}


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(module: nnx.Module, call: Callable, *inputs: Any) -> Callable[[], Any]:
    """call(module, *inputs), compiled, with exact float32 products on every device."""

    def run():
        graphdef, state = nnx.split(module)
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda state, *inputs: call(nnx.merge(graphdef, state), *inputs))(state, *inputs)

    return run


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
