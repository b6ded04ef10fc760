"""The row of a conversion table, and the rearrangements it can ask for.

A row names one leaf of our parameter tree and the torch tensor, or the numbered torch tensors stacked on its
leading axis, that it is made of. Import, export and verification all read these rows and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rearrangement:
    """An invertible rearrangement: leave out axes of length one, then reorder the remaining ones."""

    # Torch axes (all of length one) that our leaf does not have.
    dropped: tuple[int, ...] = ()
    # Position, among the remaining torch axes, of each of our axes; empty keeps their order.
    axes: tuple[int, ...] = ()

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        """Torch's layout to ours, as a view."""
        kept = np.squeeze(tensor, self.dropped) if self.dropped else tensor
        return kept.transpose(self.axes) if self.axes else kept

    def inverse(self, leaf: np.ndarray) -> np.ndarray:
        """Our layout to torch's, as a view."""
        kept = leaf.transpose(np.argsort(self.axes)) if self.axes else leaf
        return np.expand_dims(kept, self.dropped) if self.dropped else kept

    def forward_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        kept = [size for axis, size in enumerate(shape) if axis not in self.dropped]
        return tuple(kept[axis] for axis in self.axes) if self.axes else tuple(kept)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, in strips along the source's slowest axis.

    A plain numpy copy between transposed matrices misses the cache at nearly every number, which is
    several times slower than a disk. numpy copies bfloat16 faster as 16-bit integers.
    """
    if target.dtype == source.dtype and source.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)
    if source.ndim < 2:
        target[...] = source
        return
    axis = int(np.argmax(source.strides))
    target, source = np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0)
    for start in range(0, len(source), 64):
        target[start : start + 64] = source[start : start + 64]


def contiguous(source: np.ndarray) -> np.ndarray:
    """The array itself if its memory is in order, else a copy that is."""
    if source.flags.c_contiguous:
        return source
    target = np.empty(source.shape, source.dtype)
    copy(target, source)
    return target


SAME = Rearrangement()
# torch.nn.Linear (out, in) -> (in, out).
LINEAR = Rearrangement(axes=(1, 0))
# torch.nn.Conv2d (out, in, rows, columns) -> (rows, columns, in, out); depthwise kernels are the same.
CONV = Rearrangement(axes=(2, 3, 1, 0))
# torch.nn.ConvTranspose2d (in, out, rows, columns) -> (in, rows, columns, out).
CONV_TRANSPOSE = Rearrangement(axes=(0, 2, 3, 1))
# A table of positions (1, channels, rows, columns) -> (rows, columns, channels).
POSITION = Rearrangement(dropped=(0,), axes=(1, 2, 0))
# A vector or matrix stored with a leading axis of length one.
FIRST_DROPPED = Rearrangement(dropped=(0,))
FIRST_TWO_DROPPED = Rearrangement(dropped=(0, 1))
MIDDLE_TWO_DROPPED = Rearrangement(dropped=(1, 2))


@dataclass(frozen=True)
class Row:
    """One leaf of our tree and where it comes from."""

    # Name of the torch tensor; "{i}" stands for the number of a stacked one.
    torch: str
    # Path of our leaf, dotted.
    path: str
    # Shape of one torch tensor.
    shape: tuple[int, ...]
    rearrangement: Rearrangement = SAME
    # Numbers that replace "{i}", in the order of our leading axis; None: a single tensor, no leading axis.
    stack: tuple[int, ...] | None = None
    # Our vocabulary axis holds this many entries: zero rows follow torch's first axis; 0: nothing is added.
    padded: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The torch tensors this leaf is made of."""
        return (self.torch,) if self.stack is None else tuple(self.torch.format(i=i) for i in self.stack)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        first = self.padded or (self.shape[0] if self.shape else 0)
        one = self.rearrangement.forward_shape((first, *self.shape[1:]))
        return one if self.stack is None else (len(self.stack), *one)

    def parts(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The torch tensors inside a leaf, as writable views in torch's layout, without the padding."""
        for name, part in zip(self.names, [leaf] if self.stack is None else leaf, strict=True):
            tensor = self.rearrangement.inverse(part)
            yield name, tensor[: self.shape[0]] if self.padded else tensor

    def padding(self, leaf: np.ndarray) -> np.ndarray:
        """The rows of a leaf that no torch tensor fills, in torch's layout."""
        return self.rearrangement.inverse(leaf)[self.shape[0] :]

    def renamed(self, torch: str, ours: str) -> Row:
        """The same row below a prefix on each side."""
        return Row(
            torch + self.torch, ours + self.path, self.shape, self.rearrangement, self.stack, self.padded
        )


def linear(
    torch: str, path: str, out: int, into: int, *, bias: bool = True, stack: tuple[int, ...] | None = None
) -> list[Row]:
    """Rows of a torch.nn.Linear (out, into)."""
    rows = [Row(f"{torch}.weight", f"{path}.kernel", (out, into), LINEAR, stack)]
    return rows + [Row(f"{torch}.bias", f"{path}.bias", (out,), SAME, stack)] * bias


def conv(torch: str, path: str, shape: tuple[int, ...], *, stack: tuple[int, ...] | None = None) -> list[Row]:
    """Rows of a torch.nn.Conv2d whose weight has `shape` (out, in, rows, columns)."""
    return [
        Row(f"{torch}.weight", f"{path}.kernel", shape, CONV, stack),
        Row(f"{torch}.bias", f"{path}.bias", shape[:1], SAME, stack),
    ]


def norm(torch: str, path: str, features: int, *, stack: tuple[int, ...] | None = None) -> list[Row]:
    """Rows of a layer norm."""
    return [
        Row(f"{torch}.weight", f"{path}.scale", (features,), SAME, stack),
        Row(f"{torch}.bias", f"{path}.bias", (features,), SAME, stack),
    ]
