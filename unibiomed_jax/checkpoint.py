"""The converted checkpoint: a folder with everything that inference and training start from.

    config.json      the ModelConfig
    manifest.json    shape, dtype and sha256 of every parameter; written last
    params/<part>/   an Orbax checkpoint for each part (vision_model, mlp1, language_model, ...)
    tokenizer/       the tokenizer's files
    release/         what export to the released layout needs besides the weights (optional)

The parts are separate Orbax checkpoints so that saving and loading need little memory besides the result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from unibiomed_jax import distributed
from unibiomed_jax.bucket import teach_orbax, told
from unibiomed_jax.config.fields import from_dict, to_dict
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import copy_folder, in_bucket, locate, new_folder, read_json, require_space
from unibiomed_jax.inputs.tokenizer import copy_tokenizer
from unibiomed_jax.parameters import LoraInfo, abstract_params, flatten, merge_adapters, unflatten
from unibiomed_jax.stored_arrays import Need, dtype_of, fill, need_of, size_of

FORMAT = 1

REMEDY = "convert the release again with: unibiomed convert from-torch SRC DST"

# Where the parameter with a dotted path and a shape goes.
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

# Bytes of parameters that are read at once, unless one has more.
READ_TOGETHER = 64 << 20

# Parameters that are read and hashed beside each other; both let go of the interpreter meanwhile.
READERS = 4

teach_orbax()


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


def write(
    folder: Path,
    config: ModelConfig,
    parts: Iterable[tuple[str, Mapping]],
    *,
    lora: LoraInfo | None = None,
) -> str:
    """Write config, parameters and manifest into `folder`, holding two parts at a time.

    Of arrays that span processes every process writes its shares; the first one hashes and does all else.

    Args:
        folder: an existing, empty folder (see `new_folder`).
        parts: (name, nested parameters) of each part; one is asked for while the one before is being saved.
        lora: rank and alpha of adapters kept apart.

    Returns:
        The sha256 that identifies the weights.
    """
    leaves: dict[str, Future[dict]] = {}

    def finish(saving) -> None:
        with told(folder):
            saving.result()

    with ThreadPoolExecutor(1) as hasher, _weights():
        saving = None
        try:
            for name, tree in parts:
                if saving:
                    finish(saving)
                shares = {}
                for path, leaf in flatten(tree).items():
                    host = distributed.whole(leaf)
                    if distributed.is_first():
                        leaves[f"{name}.{path}"] = hasher.submit(leaf_record, host)
                    spans = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
                    shares[path] = leaf if spans else host
                place = os.fspath(folder / "params" / name)
                with told(folder):
                    saving = ocp.save_async(place, _string_keys(unflatten(shares)))
                del tree, shares, leaf, host
            records = {path: future.result() for path, future in leaves.items()}
        finally:
            if saving:
                finish(saving)

    def end() -> str:
        manifest = {
            "format": FORMAT,
            "hash": identity(records),
            "lora": {"rank": lora.rank, "alpha": lora.alpha} if lora else None,
            "leaves": records,
        }
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        return manifest["hash"]

    return distributed.first_says(end)


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
    """Save a model as a checkpoint folder that `load` and `conversion.to_torch` read; every process calls it.

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
    size = sum(leaf.nbytes for leaf in flatten(params).values())
    with contextlib.ExitStack() as filling:

        def begin() -> str:
            require_space(path, size)
            folder = filling.enter_context(new_folder(path, overwrite=overwrite))
            copy_tokenizer(locate(tokenizer), folder / "tokenizer")
            if release is not None and locate(release).is_dir():
                copy_folder(locate(release), folder / "release")
            return str(folder)

        folder = locate(distributed.first_says(begin))
        return write(folder, config, params.items(), lora=lora)


def saving_options() -> ocp.Context:
    """A context manager in which all processes together write arrays."""
    context = _alone() if distributed.is_alone() else ocp.Context()
    # Devices that have the same array write a part of it each; of a small one that is not worth the program.
    context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
    return context


def _weights() -> ocp.Context:
    context = saving_options()
    # Weights do not compress; and the arrays are not changed while they are written, so they need no copy.
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    return context


def _alone() -> ocp.Context:
    """One in which a process reads or writes by itself, and waits for no other."""
    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process-{process}"
    return context


def _string_keys(tree: Mapping) -> dict:
    return {str(k): _string_keys(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def leaf_record(leaf: np.ndarray) -> dict:
    """Shape, dtype and sha256 of a parameter, as the manifest records them."""
    digest = hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest.hexdigest()}


def identity(leaves: Mapping[str, dict]) -> str:
    """One sha256 for all parameters, from the `leaf_record` of each."""
    lines = [
        f"{path} {leaf['dtype']} {leaf['shape']} {leaf['sha256']}" for path, leaf in sorted(leaves.items())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_of(params: Mapping | nnx.State) -> str:
    """The identity of weights in memory: what a checkpoint of them would have as its hash."""
    return identity({path: leaf_record(np.asarray(leaf)) for path, leaf in flatten(params).items()})


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether `path` is meant to be a converted checkpoint (as opposed to a released one)."""
    path = locate(path)
    return (path / "manifest.json").exists() or (path / "params").is_dir()


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a checkpoint folder.

    Raises:
        InputError: the file is missing or damaged, or holds an unknown or ill-typed field.
    """
    path = locate(path)
    values = _read_json(path, "config.json")
    if isinstance(values, dict):
        values.pop("precision", None)  # version 0.1 wrote one, which no reader obeyed
    return from_dict(ModelConfig, values, str(path / "config.json"))


def read_manifest(path: str | os.PathLike) -> Manifest:
    """What a checkpoint folder holds.

    Raises:
        InputError: the file is missing or damaged, or was written by a later version.
    """
    path = locate(path)
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
    if not (folder / name).exists():
        raise InputError(f"{folder} is not a complete checkpoint ({name} is missing); {REMEDY}.")
    return read_json(folder / name, remedy=REMEDY, complaint="is damaged")


def read_part(path: str | os.PathLike, name: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """The parameters of one part as host arrays in their stored dtypes, by path below the part.

    Args:
        path: the folder.
        name: of the part.
        manifest: of the folder.

    Raises:
        InputError: the part is missing or damaged, or a parameter is not the one whose hash was recorded.
    """
    needs = {}
    for p in _paths(name, manifest):
        shape, dtype = manifest.shapes[p], dtype_of(manifest.leaves[p]["dtype"])
        needs[p] = Need({tuple((0, size) for size in shape): np.empty(shape, dtype)}, hashed=True)
    _read(locate(path), manifest, needs)
    return {p.partition(".")[2]: next(iter(need.pieces.values())) for p, need in needs.items()}


def load(
    path: str | os.PathLike,
    *,
    dtype: str | Mapping[str, str] | None = None,
    sharding: Sharding | None = None,
    merge_lora: bool = True,
) -> Checkpoint:
    """Load a checkpoint folder onto the devices, a few parameters at a time.

    A process reads its share, a few MiB after the other, and holds besides at most one parameter: as much of
    it as was written as one piece. It checks the hashes of all it reads; of what is divided among processes,
    which all call this, each reads and checks some parameters whole, if they read them from one bucket.

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
    path = locate(path)
    # Whoever cannot read says so before the others go on to what all do together.
    together = distributed.failing_together if sharding else contextlib.nullcontext
    with together():
        config, manifest = _checked(path)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {p: sharding(p, shape) if sharding else device for p, shape in manifest.shapes.items()}
    divided = [p for p, place in places.items() if not place.is_fully_addressable]
    if divided:
        of_config = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
        distributed.require_equal("checkpoint", {"hash": manifest.hash, "hash of config.json": of_config})
    divided.sort(key=lambda p: -size_of(manifest.leaves[p]))
    # Files on disks may be each machine's own.
    mine = set(distributed.share(divided) if in_bucket(path) else divided)
    params: dict = {}
    for name in dict.fromkeys(p.partition(".")[0] for p in manifest.leaves):
        wanted = dtype if isinstance(dtype, str) or dtype is None else dtype.get(name)
        part: dict[str, jax.Array] = {}
        with together():
            for paths in _read_together(name, manifest):
                needs = {p: need_of(places[p], manifest.leaves[p], wanted, p in mine) for p in paths}
                _read(path, manifest, needs)
                while needs:  # each host array is freed once its copy is on the devices
                    p, need = needs.popitem()
                    part[p.partition(".")[2]] = jax.make_array_from_callback(
                        manifest.shapes[p], places[p], functools.partial(need.piece, manifest.shapes[p])
                    )
                    del need
        if manifest.lora and merge_lora:
            part = merge_adapters(part, manifest.lora.scale)
        params[name] = unflatten(part)
    return Checkpoint(
        config, params, path / "tokenizer", manifest.hash, None if merge_lora else manifest.lora
    )


def _checked(path: Path) -> tuple[ModelConfig, Manifest]:
    """What config.json and manifest.json of a folder say, of one model."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give a converted checkpoint or {REMEDY}.")
    config, manifest = read_config(path), read_manifest(path)
    try:
        expected = {p: leaf.shape for p, leaf in abstract_params(config).items()}
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no model can be built from config.json ({error}); {REMEDY}.") from None
    check_shapes({p: s for p, s in manifest.shapes.items() if ".lora." not in p}, expected, str(path))
    return config, manifest


def placed(path: str, host: np.ndarray, sharding: Sharding) -> jax.Array:
    """The parameter at a dotted path on the devices, each of which gets its share; see `load`."""
    return jax.make_array_from_callback(host.shape, sharding(path, host.shape), host.__getitem__)


def _paths(name: str, manifest: Manifest) -> list[str]:
    """Dotted paths of the parameters of a part."""
    return [path for path in manifest.leaves if path.partition(".")[0] == name]


def _read_together(name: str, manifest: Manifest) -> Iterator[list[str]]:
    """Paths of a part's parameters, in groups of at most READ_TOGETHER bytes or one parameter."""
    group, size = [], 0
    for path in _paths(name, manifest):
        more = size_of(manifest.leaves[path])
        if group and size + more > READ_TOGETHER:
            yield group
            group, size = [], 0
        group.append(path)
        size += more
    yield group


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


def _read(path: Path, manifest: Manifest, needs: Mapping[str, Need]) -> None:
    """Fill the arrays that are needed of some parameters, by their dotted paths.

    Raises:
        InputError: a file is missing or damaged, or a parameter is not the one whose hash was recorded.
    """
    context = ts.Context()

    def read(name: str) -> bool:
        part, _, below = name.partition(".")
        folder = path.absolute() / "params" / part
        try:
            return fill(folder, below, manifest.leaves[name], needs[name], context)
        except (MemoryError, BucketError):
            raise
        except Exception as error:  # TensorStore raises many kinds
            # Of its long sentences the end says why: behind the places, before all that was asked.
            reason = str(error).partition(" [tensorstore_spec=")[0].replace(os.fspath(folder), "...")
            reason = (reason.strip().splitlines() or [type(error).__name__])[0][-200:].strip()
            raise InputError(f"{folder} cannot be read ({reason}); {REMEDY}.") from error

    with ThreadPoolExecutor(READERS) as readers:
        for name, whole in zip(needs, readers.map(read, needs), strict=True):
            if not whole:
                raise InputError(f"{path}: {name} is damaged or was changed after it was written; {REMEDY}.")
