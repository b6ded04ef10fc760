"""Two checkpoints compared, module by module.

Each is a released folder or a converted one. The numbers are compared tensor by tensor. For a released folder
against a converted one the outputs of the modules are compared too, those of PyTorch with ours on one random
input (which needs the `parity` extra). What comes back is a report; the command makes it an exit code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from rich.table import Table

from unibiomed_jax import checkpoint
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.conversion import sources
from unibiomed_jax.conversion.assemble import build_leaf
from unibiomed_jax.conversion.rows import Row
from unibiomed_jax.conversion.tables import by_component, model_rows
from unibiomed_jax.errors import InputError
from unibiomed_jax.parameters import merge_adapters


@dataclass
class Difference:
    """How far the tensors of one module are apart."""

    module: str
    tensors: int = 0
    numbers: int = 0
    # Tensors that agree in every bit.
    equal: int = 0
    # Largest absolute difference.
    largest: float = 0.0
    # The first tensor that differs, under its released name, and how.
    first: str = ""


def module_of(path: str) -> str:
    """The module a leaf belongs to: the part, and inside SAM2 the part of that."""
    first, second = path.split(".")[:2]
    return f"sam2.{second}" if first == "sam2" and path.count(".") > 1 else first


class Opened:
    """A checkpoint of either kind, whose leaves are read one part at a time."""

    def __init__(self, path: Path):
        self.path, self.released = path, not checkpoint.is_checkpoint(path)
        if self.released:
            self.source = sources.released(path)
            self.config = self.source.config
        else:
            self.config, self.manifest = checkpoint.read_config(path), checkpoint.read_manifest(path)

    def part(self, name: str, rows: list[Row]) -> dict[str, np.ndarray]:
        """{dotted path: leaf} of one part, adapters merged.

        Raises:
            InputError: a leaf is not the one whose hash was recorded when it was written.
        """
        if self.released:
            return {row.path: build_leaf(row, self.source.tensors) for row in rows}
        leaves = {f"{name}.{p}": v for p, v in checkpoint.read_part(self.path, name, self.manifest).items()}
        return merge_adapters(leaves, self.manifest.lora.scale) if self.manifest.lora else leaves


def compare(a: Opened, b: Opened) -> Iterator[Difference]:
    """The difference of each module, in the order of the model.

    Raises:
        InputError: the checkpoints are of differently shaped models, or one is damaged.
    """
    for part in fields(ModelConfig):
        ours, theirs = getattr(a.config, part.name), getattr(b.config, part.name)
        if part.name in ("vision", "language", "sam2", "downsample_ratio", "ps_version") and ours != theirs:
            raise InputError(
                f"{a.path} and {b.path} hold different models ({part.name}: {ours} and {theirs}); compare "
                "checkpoints of one kind."
            )
    for part, rows in by_component(model_rows(a.config)).items():
        differences: dict[str, Difference] = {}
        left, right = a.part(part, rows), b.part(part, rows)
        for row in rows:
            module = module_of(row.path)
            found = differences.setdefault(module, Difference(module))
            for (name, x), (_, y) in zip(row.parts(left[row.path]), row.parts(right[row.path]), strict=True):
                _compare(found, name, x, y)
        yield from differences.values()


def _compare(found: Difference, name: str, x: np.ndarray, y: np.ndarray) -> None:
    found.tensors += 1
    found.numbers += x.size
    bits = np.dtype(f"u{x.itemsize}")
    if x.dtype == y.dtype and np.array_equal(x.view(bits), y.view(bits)):
        found.equal += 1
        return
    apart = np.abs(x.astype(np.float32) - y.astype(np.float32))
    # A NaN on one side only is as far apart as can be.
    apart = np.where(np.isnan(apart), np.where(np.isnan(x) & np.isnan(y), 0, np.inf), apart)
    found.largest = max(found.largest, float(apart.max(initial=0)))
    if not found.first:
        kinds = "" if x.dtype == y.dtype else f", stored as {x.dtype} and {y.dtype}"
        where = [int(i) for i in np.unravel_index(apart.argmax(), apart.shape)]
        found.first = f"{name}: {apart.max(initial=0):.3g} apart at {where}{kinds}"


def weights_table(differences: list[Difference]) -> Table:
    table = Table(title="Weights")
    for title in ("module", "tensors", "numbers", "bit-equal", "largest", ""):
        table.add_column(title, justify="left" if title in ("module", "") else "right", no_wrap=True)
    for found in differences:
        same = found.equal == found.tensors
        table.add_row(
            found.module,
            f"{found.tensors:,}",
            f"{found.numbers:,}",
            f"{found.equal:,}",
            f"{found.largest:.3g}",
            "[green]equal" if same else "[red]differs",
        )
    return table
