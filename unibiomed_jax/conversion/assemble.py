"""Torch tensors to leaves of our tree and back, strictly: nothing missing, left over, or of another shape."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from unibiomed_jax.conversion.reading import Tensor
from unibiomed_jax.conversion.rows import Row, copy
from unibiomed_jax.conversion.tables import largest_first
from unibiomed_jax.conversion.tables.qwen2 import TORCH_EMBEDDING, TORCH_HEAD
from unibiomed_jax.errors import InputError

# Threads that build the leaves of a part; reading and copying let go of the interpreter.
BUILDERS = 2


def check_complete(rows: Iterable[Row], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError unless rows and tensors correspond one to one, with equal shapes.

    The message names the first offenders and, for a name nobody knows, the nearest missing one.
    """
    shapes = {name: row.shape for row in rows for name in row.names}
    unknown = [name for name in tensors if name not in shapes]
    missing = [name for name in shapes if name not in tensors]
    problems = []
    for name in unknown[:3]:
        near = difflib.get_close_matches(name, missing or shapes, n=1)
        hint = f" (nearest {'missing' if missing else 'known'} name: {near[0]})" if near else ""
        problems.append(f"{name} has no place in this model{hint}")
    if len(unknown) > 3:
        problems.append(f"{len(unknown) - 3} more tensors have no place")
    problems += [f"{name} is missing" for name in missing[:3]]
    if len(missing) > 3:
        problems.append(f"{len(missing) - 3} more are missing")
    wrong = [name for name in shapes if name in tensors and tensors[name].shape != shapes[name]]
    problems += [f"{name} has shape {tensors[name].shape}, not {shapes[name]}" for name in wrong[:3]]
    if len(wrong) > 3:
        problems.append(f"{len(wrong) - 3} more have another shape")
    if problems:
        raise InputError(f"{where} does not fit its config.json: {'; '.join(problems)}.")


def check_tied_head(tensors: dict[str, Tensor], tied: bool, where: str) -> bool:
    """Take a stored copy of a tied head out of `tensors`; return whether there was one.

    Raises:
        InputError: the head is said to be tied but differs from the embedding.
    """
    if not tied or TORCH_HEAD not in tensors or TORCH_EMBEDDING not in tensors:
        return False
    head, embedding = tensors[TORCH_HEAD], tensors[TORCH_EMBEDDING]
    if (
        head.shape != embedding.shape
        or head.dtype != embedding.dtype
        or not np.array_equal(_bits(head.read()), _bits(embedding.read()))
    ):
        raise InputError(
            f"{where}: config.json ties {TORCH_HEAD} to {TORCH_EMBEDDING} but their contents differ; set "
            "tie_word_embeddings to false in llm_config, or repair the checkpoint."
        )
    del tensors[TORCH_HEAD]
    return True


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint16 if values.itemsize == 2 else np.uint32)


def build_leaf(row: Row, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The leaf of a row; float32 holds tensors of different number formats exactly."""
    dtypes = {tensors[name].dtype for name in row.names}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    leaf = np.empty(row.leaf_shape, dtype)
    if row.padded:
        row.padding(leaf)[...] = 0
    for name, part in row.parts(leaf):
        copy(part, tensors[name].read())
    return leaf


def build_parts(
    rows: Iterable[Row], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(part, {path below it: leaf}) for every part of the model, built one after the other, largest first."""
    with ThreadPoolExecutor(BUILDERS) as builders:
        for part, part_rows in largest_first(list(rows)):
            leaves = builders.map(lambda row: build_leaf(row, tensors), part_rows)
            yield part, dict(zip((row.path.partition(".")[2] for row in part_rows), leaves, strict=True))


def split_leaf(
    row: Row, leaf: np.ndarray, dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """The torch tensors inside a leaf, each in the number format it had (`dtypes`), or the leaf's own."""
    for name, tensor in row.parts(leaf):
        yield name, tensor.astype(dtypes.get(name, leaf.dtype), copy=False)
