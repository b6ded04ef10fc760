"""Arrays of an Orbax checkpoint, of which a process reads what it needs.

They are read through TensorStore, beneath Orbax, which gives an array when it has read all of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from unibiomed_jax.bucket import array_store, told

# Bytes that are read at once of a larger array.
BLOCK = 1 << 20

# The folder of a checkpoint in which Orbax keeps the arrays of a tree.
STATE = "state"

# A part of an array: (start, stop) along every axis.
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Need:
    """What this process needs of a parameter."""

    # Arrays to fill, each with the part of the parameter that lies within some bounds.
    pieces: dict[Bounds, np.ndarray]
    # Whether it reads all of it and compares the hash.
    hashed: bool

    def piece(self, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        return self.pieces[_bounds(shape, index)]


def need_of(place: jax.sharding.Sharding, leaf: dict, dtype: str | None, hashed: bool) -> Need:
    """What a parameter that goes to some place takes, besides the hash of what comes here as a whole."""
    shape, wanted = tuple(leaf["shape"]), dtype_of(dtype or leaf["dtype"])
    parts = {_bounds(shape, index) for index in place.addressable_devices_indices_map(shape).values()}
    pieces = {part: np.empty([stop - start for start, stop in part], wanted) for part in parts}
    return Need(pieces, hashed or place.is_fully_addressable or _bounds(shape, ()) in pieces)


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...]) -> Bounds:
    slices = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(part.indices(size)[:2] for part, size in zip(slices, shape, strict=True))


def fill(folder: Path, name: str, leaf: dict, need: Need, context: ts.Context) -> bool:
    """Fill what is needed of an array.

    Args:
        folder: of the Orbax checkpoint.
        name: of the array in it, dotted.
        leaf: its shape, dtype and sha256 as they were written.
        need: is filled.
        context: threads and connections, for all arrays of a checkpoint.

    Returns:
        False: it is not the array that was written.

    Raises:
        BucketError: the bucket does not answer, or refuses.
        Exception: of TensorStore; it cannot be read.
    """
    # A chunk that was read is kept for the blocks to come: it may be the whole array. One MiB for overhead.
    kept = {"total_bytes_limit": size_of(leaf) + (1 << 20)}
    chunks = ts.Context({"cache_pool#chunks": kept}, parent=context)
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": array_store(folder / STATE), "path": f"{name}/"},
        "cache_pool": "cache_pool#chunks",
        "recheck_cached_data": "open",
    }
    digest = hashlib.sha256()
    with told(folder):
        store = ts.open(spec, open=True, read=True, context=chunks).result()
        if [list(store.shape), str(store.dtype.numpy_dtype)] != [leaf["shape"], leaf["dtype"]]:
            return False
        for block in _blocks(store.shape, BLOCK // store.dtype.numpy_dtype.itemsize):
            whole = _get(store, block) if need.hashed else None
            if whole is not None:
                digest.update(whole.reshape(-1).view(np.uint8))
            for bounds, piece in need.pieces.items():
                both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, bounds, strict=True))
                if all(start < stop for start, stop in both):
                    found = _get(store, both) if whole is None else whole[_within(block, both)]
                    piece[_within(bounds, both)] = found
    return not need.hashed or digest.hexdigest() == leaf["sha256"]


def _blocks(shape: tuple[int, ...], most: int) -> Iterator[Bounds]:
    """An array cut into parts, in the order of their memory, of at most so many elements each (or one)."""
    axis = next((axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= most), None)
    if axis is None:
        yield ()
        return
    step = max(1, most // max(1, math.prod(shape[axis + 1 :])))
    for outer in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            rows = (start, min(start + step, shape[axis]))
            yield (*((i, i + 1) for i in outer), rows, *((0, size) for size in shape[axis + 1 :]))


def _get(store: ts.TensorStore, part: Bounds) -> np.ndarray:
    return store[tuple(slice(*bounds) for bounds in part)].read(order="C").result()


def _within(outer: Bounds, inner: Bounds) -> tuple[slice, ...]:
    """Where a part lies in an array that has a larger one."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def size_of(leaf: dict) -> int:
    """Bytes of a parameter, from its entry in the manifest."""
    return math.prod(leaf["shape"]) * dtype_of(leaf["dtype"]).itemsize
