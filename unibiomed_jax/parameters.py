"""Parameters as nested trees and as flat tables, dotted path -> array.

A path pattern is a shell-style glob over the dotted path in which `*` also matches dots, for example
"language_model.layers.*.kernel" or "sam2.memory_*".
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import FLOAT32, Precision
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel

Parameters = dict[str, jax.Array]

# Patterns of what trains that may find nothing: adapters, since those of rank 0 are none; and the output head
# beside the embedding, since it may be the embedding itself.
ADAPTERS = "*.lora.*"
EMBEDDING, HEAD = "language_model.embed_tokens", "language_model.lm_head.kernel"


# ------------------------------------------------------------------------------------------------------------
# Trees and tables


def flatten(params: Mapping | nnx.State) -> dict[str, Any]:
    """Nested parameters as {dotted path: array}, in the order of the tree."""
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """{dotted path: array} as nested dicts; numbers in a path become int keys, as in nnx.to_pure_dict."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """A model as its structure and its parameters by dotted path (abstract ones stay abstract)."""
    graphdef, state = nnx.split(model)
    return graphdef, flatten(state)


def merge(graphdef: nnx.GraphDef, *tables: Parameters) -> nnx.Module:
    """The model again, from its structure and one or more disjoint tables of parameters."""
    return nnx.merge(graphdef, unflatten({path: value for table in tables for path, value in table.items()}))


@functools.lru_cache(maxsize=4)
def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path and shape of every parameter of the model that `config` describes, without allocating any."""
    model = nnx.eval_shape(lambda: UniBiomedModel(config, FLOAT32, rngs=nnx.Rngs(0)))
    return flatten(nnx.state(model, nnx.Param))


# ------------------------------------------------------------------------------------------------------------
# Choosing by path


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


# ------------------------------------------------------------------------------------------------------------
# Number formats


def stored_for(table: Parameters, config: ModelConfig, precision: Precision) -> Parameters:
    """Every matrix in the dtype it is multiplied in; vectors stay in float32, where they are used.

    An embedding table that is only looked up and came in bfloat16 stays so: its rows can be widened later.
    """
    return {
        path: jnp.asarray(leaf, _stored_dtype(path, leaf.dtype, config, precision))
        for path, leaf in table.items()
    }


def _stored_dtype(path: str, came: DTypeLike, config: ModelConfig, precision: Precision) -> DTypeLike:
    names = tuple(path.split("."))
    if path == EMBEDDING and came == jnp.bfloat16 and not config.language.tie_word_embeddings:
        return came
    return _kernel_dtype(names, config, precision) if names[-1] in ("kernel", "embed_tokens") else "float32"


def _kernel_dtype(names: tuple[str, ...], config: ModelConfig, precision: Precision) -> str:
    match names:
        case ("vision_model" | "mlp1", *_):
            return precision.vision
        case ("language_model", *_):
            return precision.language
        case ("sam2", "image_encoder", "trunk", "runs", run, *_) if precision.sam2_encoder == "mixed":
            fine = config.sam2.hiera.runs()[int(run)].dim_out == config.sam2.hiera.embed_dim
            return "float32" if fine else "bfloat16"
        case ("sam2", "image_encoder", *_) | ("sam2", "sam_mask_decoder", "conv_s0" | "conv_s1", *_):
            return "float32" if precision.sam2_encoder == "mixed" else precision.sam2_encoder
        case ("sam2", *_):
            return precision.sam2_decoder
    return "float32"


# ------------------------------------------------------------------------------------------------------------
# Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)


@dataclass(frozen=True)
class LoraInfo:
    """Adapters that lie beside the kernels they update: W + (alpha / rank) A B."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def merge_adapters(flat: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Fold every <linear>.lora.{a, b} into <linear>.kernel.

    Args:
        flat: {dotted path: array}; those of a stack of layers have a leading layer axis.
        scale: alpha / rank.
    """
    merged = {path: leaf for path, leaf in flat.items() if ".lora." not in path}
    for path in [path for path in flat if path.endswith(".lora.a")]:
        linear = path.removesuffix(".lora.a")
        kernel, a, b = merged[f"{linear}.kernel"], flat[path], flat[f"{linear}.lora.b"]
        if a.ndim == 2:
            merged[f"{linear}.kernel"] = updated(kernel, a, b, scale)
            continue
        # Layer by layer: float32 copies of a whole stack could be as large as the rest of the model.
        stack = np.stack if isinstance(a, np.ndarray) else jnp.stack
        layers = range(len(kernel))  # an array that spans processes cannot be iterated
        merged[f"{linear}.kernel"] = stack([updated(kernel[i], a[i], b[i], scale) for i in layers])
    return merged


def updated(kernel, left, right, scale: float):
    """kernel + scale * left @ right in float32, rounded once to the kernel's number format."""
    with jax.default_matmul_precision("highest"):
        update = left.astype(np.float32) @ right.astype(np.float32)
    return (kernel.astype(np.float32) + np.float32(scale) * update).astype(kernel.dtype)
