"""What the modules of two checkpoints compute: PyTorch's (of transformers) beside ours, on one random input.

Every module gets its own input, so that one that differs does not hide those after it. All in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from rich.table import Table

from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.conversion.oracles import language, sam2
from unibiomed_jax.conversion.oracles.common import TorchWeights
from unibiomed_jax.conversion.tables import by_component, model_rows
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import unflatten

# The comparisons of each part. Each yields (module, PyTorch's outputs, ours), the last two as functions that
# return {output: array}.
CHECKS = {
    "vision_model": language.vision,
    "mlp1": language.projector,
    "language_model": language.language,
    "text_hidden_fcs": language.bridge,
    "sam2": sam2.sam2,
}
# Largest error, relative to the largest number of the output, that rounding in another order explains.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Output:
    """How far one output of one module is apart."""

    module: str
    output: str
    shape: tuple[int, ...]
    # Largest absolute difference over the largest absolute value of PyTorch's.
    error: float

    @property
    def agrees(self) -> bool:
        return self.error <= TOLERANCE


def outputs_table(outputs: list[Output]) -> Table:
    table = Table(title=f"Outputs, PyTorch's against ours (relative error, at most {TOLERANCE:.0e})")
    for title in ("module", "output", "shape", "error", ""):
        table.add_column(title, justify="right" if title == "error" else "left", no_wrap=True)
    for found in outputs:
        verdict = "[green]agrees" if found.agrees else "[red]differs"
        shape = "x".join(map(str, found.shape))
        table.add_row(found.module, found.output, shape, f"{found.error:.1e}", verdict)
    return table


def compare(released: Any, converted: Any) -> Iterator[Output]:
    """Run every module of a released checkpoint in PyTorch and of a converted one here.

    Args:
        released, converted: `conversion.verify.Opened` of each kind, of models of the same shape.
    """
    config = converted.config
    abstract = nnx.eval_shape(lambda: UniBiomedModel(config, FLOAT32, rngs=nnx.Rngs(0)))
    for part, rows in by_component(model_rows(config)).items():
        graphdef, state = nnx.split(getattr(abstract, part))
        leaves = converted.part(part, rows)
        values = {path.partition(".")[2]: np.asarray(v, np.float32) for path, v in leaves.items()}
        nnx.replace_by_pure_dict(state, jax.tree.map(jax.numpy.asarray, unflatten(values)))
        del leaves, values
        module = nnx.merge(graphdef, state)
        for name, theirs, ours in CHECKS[part](config, TorchWeights(released.source.tensors), module):
            with torch.no_grad():
                expected = theirs()
            found = ours()
            for output, values in expected.items():
                yield Output(name, output, values.shape, _error(found[output], values))


def _error(ours: Any, theirs: np.ndarray) -> float:
    ours = np.asarray(ours, np.float32).reshape(theirs.shape)
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")
