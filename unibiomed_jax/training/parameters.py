"""Parameters as one flat table, dotted path -> array: what training, sharding and checkpoints work on.

A path pattern is a shell-style glob over the dotted path in which `*` also matches dots, for example
"language_model.layers.*.kernel" or "sam2.memory_*".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import jax
from flax import nnx

from unibiomed_jax.checkpoint import flatten, unflatten
from unibiomed_jax.errors import InputError

Parameters = dict[str, jax.Array]

# Patterns of what trains that may find nothing: adapters, since those of rank 0 are none; and the output head
# beside the embedding, since it may be the embedding itself.
ADAPTERS = "*.lora.*"
EMBEDDING, HEAD = "language_model.embed_tokens", "language_model.lm_head.kernel"


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """A model as its structure and its parameters by dotted path (abstract ones stay abstract)."""
    graphdef, state = nnx.split(model)
    return graphdef, flatten(state)


def merge(graphdef: nnx.GraphDef, *tables: Parameters) -> nnx.Module:
    """The model again, from its structure and one or more disjoint tables of parameters."""
    return nnx.merge(graphdef, unflatten({path: value for table in tables for path, value in table.items()}))


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns describes the path."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def require_matches(patterns: Iterable[str], paths: Iterable[str], what: str) -> None:
    """Refuse a pattern that describes no path.

    Raises:
        InputError: names the pattern and the nearest path.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0)
            hint = f"the nearest is {near[0]!r}" if near else "there is none at all"
            raise InputError(f"The pattern {pattern!r} in {what} matches no parameter: {hint}.")


def partition(
    parameters: Mapping[str, jax.Array], trainable: Iterable[str], frozen: Iterable[str]
) -> tuple[Parameters, Parameters]:
    """Split a table into (trainable, frozen): a path trains if `trainable` and not `frozen` describes it.

    Raises:
        InputError: a pattern describes no parameter (in `trainable`, adapters and the head beside the
            embedding may be absent), or nothing would train.
    """
    optional = {ADAPTERS, HEAD} if EMBEDDING in trainable else {ADAPTERS}
    require_matches([pattern for pattern in trainable if pattern not in optional], parameters, "trainable")
    require_matches(frozen, parameters, "frozen")
    chosen = {path for path in parameters if matches(path, trainable) and not matches(path, frozen)}
    if not chosen:
        raise InputError(
            "No parameter would train: `trainable` finds none that is not `frozen`; change one of them, or "
            "--lora.rank if it is 0."
        )
    return (
        {path: value for path, value in parameters.items() if path in chosen},
        {path: value for path, value in parameters.items() if path not in chosen},
    )


def count(parameters: Mapping[str, jax.Array], padding_rows: int = 0) -> int:
    """How many numbers a table holds, not counting the rows that only pad the vocabulary."""
    total = 0
    for path, value in parameters.items():
        axis = {EMBEDDING: 0, HEAD: 1}.get(path)
        padding = 0 if axis is None else padding_rows * value.shape[1 - axis]
        total += value.size - padding
    return total
