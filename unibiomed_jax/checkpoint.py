"""The converted checkpoint: a folder with everything that inference and training start from.

    config.json      the ModelConfig
    manifest.json    shape, dtype and sha256 of every parameter; written last
    params/<part>/   an Orbax checkpoint for each part (vision_model, mlp1, language_model, ...)
    tokenizer/       the tokenizer's files
    release/         what only the way back to the released layout needs (optional)

The parts are separate Orbax checkpoints so that saving and loading need little memory besides the result.
This is the only module that knows Orbax.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from unibiomed_jax.config import ModelConfig, from_dict, to_dict
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import new_folder, require_space
from unibiomed_jax.inference.tokenizer import copy_tokenizer

FORMAT = 1
REMEDY = "convert the release again with: python -m convert.from_torch SRC DST"
# Threads that hash what was read; hashlib lets go of the interpreter meanwhile.
HASHERS = 4


@dataclass(frozen=True)
class LoraInfo:
    """Adapters that lie beside the kernels they update: W + (alpha / rank) A B."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds."""

    # Shape, dtype name and sha256 of every parameter by its dotted path.
    leaves: dict[str, dict]
    # The adapters kept apart, if any.
    lora: LoraInfo | None
    # One sha256 over all parameters: the identity of the weights.
    hash: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(leaf["shape"]) for path, leaf in self.leaves.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    config: ModelConfig
    # Parameters as the nested dict of nnx.to_pure_dict, lists keyed by int.
    params: dict
    # Folder with the tokenizer's files.
    tokenizer: Path
    # sha256 that identifies the weights as they are stored.
    hash: str
    # The adapters still apart from their kernels, if any.
    lora: LoraInfo | None


# ------------------------------------------------------------------------------------------------------------
# Trees


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


@functools.lru_cache(maxsize=4)
def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path and shape of every parameter of the model that `config` describes, without allocating any."""
    from unibiomed_jax.models.unibiomed import UniBiomedModel

    model = nnx.eval_shape(lambda: UniBiomedModel(config, rngs=nnx.Rngs(0)))
    return flatten(nnx.state(model, nnx.Param))


# ------------------------------------------------------------------------------------------------------------
# Writing


def write(
    folder: Path,
    config: ModelConfig,
    parts: Iterable[tuple[str, Mapping]],
    *,
    lora: LoraInfo | None = None,
) -> str:
    """Write config, parameters and manifest into `folder`, holding two parts at a time.

    Args:
        folder: an existing, empty folder (see `new_folder`).
        parts: (name, nested parameters) of each part; one is asked for while the one before is being saved.
        lora: rank and alpha of adapters kept apart.

    Returns:
        The sha256 that identifies the weights.
    """
    leaves: dict[str, Future[dict]] = {}
    with ThreadPoolExecutor(1) as hasher, _context():
        saving = None
        try:
            for name, tree in parts:
                if saving:
                    saving.result()
                host = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
                for path, leaf in host.items():
                    leaves[f"{name}.{path}"] = hasher.submit(describe, leaf)
                saving = ocp.save_async(folder / "params" / name, _string_keys(unflatten(host)))
                del tree, host, leaf
            records = {path: record.result() for path, record in leaves.items()}
        finally:
            if saving:
                saving.result()
    manifest = {
        "format": FORMAT,
        "hash": identity(records),
        "lora": {"rank": lora.rank, "alpha": lora.alpha} if lora else None,
        "leaves": records,
    }
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest["hash"]


def save(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping | nnx.State,
    tokenizer: str | os.PathLike,
    *,
    lora: LoraInfo | None = None,
    release: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> str:
    """Save a model as a checkpoint folder that `load` and `convert.to_torch` read, from a single process.

    Args:
        path: the folder to create; it appears complete or not at all.
        params: all parameters, nested as in nnx.to_pure_dict, in whatever dtypes they shall be stored.
        tokenizer: folder with the tokenizer's files (the `tokenizer` of the Checkpoint the model came from).
        lora: rank and alpha, where `params` holds adapters apart from their kernels.
        release: the `release` folder of the checkpoint the model came from, kept for the way back.
        overwrite: replace an existing folder.

    Returns:
        The sha256 that identifies the weights.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    require_space(path, sum(leaf.nbytes for leaf in flatten(params).values()))
    with new_folder(path, overwrite=overwrite) as folder:
        copy_tokenizer(Path(tokenizer), folder / "tokenizer")
        if release is not None and Path(release).is_dir():
            shutil.copytree(release, folder / "release")
        return write(folder, config, params.items(), lora=lora)


def _context() -> ocp.Context:
    # Weights do not compress; and the arrays are not changed while they are written, so they need no copy.
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    return context


def _string_keys(tree: Mapping) -> dict:
    return {str(k): _string_keys(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def describe(leaf: np.ndarray) -> dict:
    """Shape, dtype and sha256 of a parameter, as the manifest records them."""
    digest = hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest.hexdigest()}


def identity(leaves: Mapping[str, dict]) -> str:
    """One sha256 for all parameters, from what `describe` says of each."""
    lines = [
        f"{path} {leaf['dtype']} {leaf['shape']} {leaf['sha256']}" for path, leaf in sorted(leaves.items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_of(params: Mapping | nnx.State) -> str:
    """The identity of weights in memory: what a checkpoint of them would have as its hash."""
    return identity({path: describe(np.asarray(leaf)) for path, leaf in flatten(params).items()})


# ------------------------------------------------------------------------------------------------------------
# Reading


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether `path` is meant to be a converted checkpoint (as opposed to a released one)."""
    return (Path(path) / "manifest.json").exists() or (Path(path) / "params").is_dir()


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a checkpoint folder.

    Raises:
        InputError: the file is missing or damaged, or holds an unknown or ill-typed field.
    """
    return from_dict(ModelConfig, _read_json(Path(path), "config.json"), str(Path(path) / "config.json"))


def read_manifest(path: str | os.PathLike) -> Manifest:
    """What a checkpoint folder holds.

    Raises:
        InputError: the file is missing or damaged, or was written by a later version.
    """
    path = Path(path)
    values = _read_json(path, "manifest.json")
    try:
        if values["format"] != FORMAT:
            raise InputError(f"{path} has format {values['format']}, this version reads {FORMAT}; {REMEDY}.")
        lora = LoraInfo(**values["lora"]) if values["lora"] else None
        manifest = Manifest(values["leaves"], lora, values["hash"])
        if manifest.hash != identity(manifest.leaves):
            raise InputError(f"{path / 'manifest.json'} was changed after it was written; {REMEDY}.")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / 'manifest.json'} is damaged ({error!r}); {REMEDY}.") from None
    return manifest


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is not a complete checkpoint ({name} is missing); {REMEDY}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} is damaged ({error}); {REMEDY}.") from None


def read_part(path: str | os.PathLike, name: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """The parameters of one part as host arrays in their stored dtypes, by path below the part.

    Raises:
        InputError: the part is missing or damaged, or a parameter is not the one whose hash was recorded.
    """
    leaves = {p.partition(".")[2]: leaf for p, leaf in manifest.leaves.items() if p.partition(".")[0] == name}
    # A broadcast scalar tells Orbax to restore a numpy array of this shape and takes no memory.
    abstract = {
        p: np.broadcast_to(np.zeros((), dtype_of(leaf["dtype"])), leaf["shape"]) for p, leaf in leaves.items()
    }
    found = _restore(Path(path), name, abstract)
    with ThreadPoolExecutor(HASHERS) as hashers:
        for p, record in zip(found, hashers.map(describe, found.values()), strict=True):
            if record != leaves[p]:
                raise InputError(
                    f"{path}: {name}.{p} is damaged or was changed after it was written; {REMEDY}."
                )
    return found


def load(
    path: str | os.PathLike,
    *,
    dtype: str | Mapping[str, str] | None = None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    merge_lora: bool = True,
) -> Checkpoint:
    """Load a checkpoint folder onto the devices, part by part; each process reads and checks all of it.

    Args:
        path: the folder.
        dtype: cast every parameter to this dtype, or those of each part named in a mapping
            ({"vision_model": "bfloat16"}); None keeps what is stored.
        sharding: where each parameter goes, from its dotted path and shape; None is the default device.
        merge_lora: fold adapters that are kept apart into their kernels (in float32); otherwise they stay
            at <linear>.lora.{a, b}.

    Raises:
        InputError: a file is missing, a file or a parameter is damaged, or config.json describes another
            model than the parameters.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give a converted checkpoint or {REMEDY}.")
    config, manifest = read_config(path), read_manifest(path)
    try:
        expected = {p: leaf.shape for p, leaf in abstract_params(config).items()}
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no model can be built from config.json ({error}); {REMEDY}.") from None
    check_shapes({p: s for p, s in manifest.shapes.items() if ".lora." not in p}, expected, str(path))
    place = sharding or (lambda path, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params: dict = {}
    for name in dict.fromkeys(p.partition(".")[0] for p in manifest.leaves):
        wanted = dtype if isinstance(dtype, str) or dtype is None else dtype.get(name)
        part = read_part(path, name, manifest)
        for p, leaf in part.items():  # the host array goes when its like on the devices takes its place
            host = leaf.astype(dtype_of(wanted), copy=False) if wanted else leaf
            part[p] = jax.make_array_from_callback(
                host.shape, place(f"{name}.{p}", host.shape), host.__getitem__
            )
        if manifest.lora and merge_lora:
            part = merge_adapters(part, manifest.lora.scale)
        params[name] = unflatten(part)
    return Checkpoint(
        config, params, path / "tokenizer", manifest.hash, None if merge_lora else manifest.lora
    )


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raise InputError unless the parameters have the paths and shapes of the model of config.json."""
    for path in [*expected, *found]:
        if expected.get(path) != found.get(path):
            should, has = expected.get(path, "absent"), found.get(path, "missing")
            raise InputError(
                f"{where}: config.json describes another model than the parameters: {path} should be "
                f"{should} but is {has}; restore the config.json that was written with them."
            )


def merge_adapters(flat: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Fold every <linear>.lora.{a, b} into <linear>.kernel: W + scale * A B, in float32, then W's dtype.

    Args:
        flat: {dotted path: array}; those of a stack of layers have a leading layer axis.
        scale: alpha / rank.
    """
    merged = {path: leaf for path, leaf in flat.items() if ".lora." not in path}
    for path in [path for path in flat if path.endswith(".lora.a")]:
        linear = path.removesuffix(".lora.a")
        kernel, a, b = merged[f"{linear}.kernel"], flat[path], flat[f"{linear}.lora.b"]
        if a.ndim == 2:
            merged[f"{linear}.kernel"] = _merge(kernel, a, b, scale)
            continue
        # Layer by layer: float32 copies of a whole stack could be as large as the rest of the model.
        stack = np.stack if isinstance(a, np.ndarray) else jnp.stack
        layers = zip(kernel, a, b, strict=True)
        merged[f"{linear}.kernel"] = stack([_merge(*layer, scale) for layer in layers])
    return merged


def _merge(kernel, a, b, scale: float):
    with jax.default_matmul_precision("highest"):
        update = a.astype(np.float32) @ b.astype(np.float32)
    return (kernel.astype(np.float32) + np.float32(scale) * update).astype(kernel.dtype)


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _restore(path: Path, name: str, abstract: Mapping[str, Any]) -> dict[str, Any]:
    folder = path.absolute() / "params" / name  # Orbax refuses relative paths
    try:
        return flatten(ocp.load(folder, _string_keys(unflatten(abstract))))
    except Exception as error:  # Orbax and tensorstore raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{folder} cannot be read ({reason}); {REMEDY}.") from error
