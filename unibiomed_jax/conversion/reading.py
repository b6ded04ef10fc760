"""Tensors of safetensors folders and .pth files: names and shapes at once, contents one tensor at a time.

No pickle is executed (torch.load runs with weights_only=True), and no file outside the given folder is named.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from unibiomed_jax import files
from unibiomed_jax.errors import InputError

# The number formats of weights, by their name in safetensors files.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A header longer than this is not one (the safetensors format's own limit).
MAX_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read only when it is needed."""

    dtype: np.dtype
    shape: tuple[int, ...]
    # Reads the contents; the array may be read-only.
    read: Callable[[], np.ndarray]
    # The file it lies in, for messages.
    file: str


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: the file is missing, is not JSON, or names a key twice.
    """
    return files.read_json(path, remedy="copy it from the release again", unique_keys=True)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        InputError: the file is missing, truncated or corrupt, or holds numbers that are not weights.
    """
    try:
        size = path.stat().st_size
        length = struct.unpack("<Q", files.read_range(path, 0, 8))[0]
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{path} is truncated or not a safetensors file; download it again.")
        header = json.loads(files.read_range(path, 8, length), object_pairs_hook=files.unlike_keys)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; download it again.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its rights.") from None
    except (struct.error, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has a corrupt header ({error}); download it again.") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} has a corrupt header (not a table of tensors); download it again.")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            shape = tuple(int(extent) for extent in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
            dtype_name = str(entry["dtype"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError(f"{path} has a corrupt entry for {name!r}; download it again.") from None
        if dtype_name not in DTYPES:
            raise InputError(
                f"{path}: {name!r} holds {dtype_name} numbers, but weights must be {', '.join(DTYPES)}; "
                "convert a checkpoint that is not quantised."
            )
        dtype = DTYPES[dtype_name]
        if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise InputError(
                f"{path} has a corrupt entry for {name!r} (size and shape differ); download it again."
            )
        spans.append((begin, end, name))
        tensors[name] = Tensor(dtype, shape, _reader(path, dtype, shape, start + begin), str(path))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise InputError(f"{path} has a corrupt entry for {name!r} (overlap or gap); download it again.")
        position = end
    if start + position != size:
        found = "truncated" if start + position > size else "longer than its header says"
        raise InputError(f"{path} is {found} ({size:,} bytes of {start + position:,}); download it again.")
    return tensors


def _reader(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if files.in_bucket(path):
            values = np.frombuffer(files.read_range(path, offset, math.prod(shape) * dtype.itemsize), dtype)
        else:
            values = np.fromfile(path, dtype, math.prod(shape), offset=offset)
        if values.size != math.prod(shape):
            raise InputError(f"{path} became shorter while it was read; download it again.")
        return values.reshape(shape)

    return read


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder with one safetensors file, or with shards and their index.

    Raises:
        InputError: a shard is missing or damaged, the index names a file outside the folder, or index and
            shards disagree.
    """
    index_path, whole = folder / INDEX, folder / "model.safetensors"
    if not index_path.exists():
        if whole.exists():
            return read_safetensors(whole)
        raise InputError(
            f"{folder} holds neither model.safetensors nor {INDEX}; give the folder of a released checkpoint."
        )
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            f"{index_path} has no table 'weight_map' of file names; copy it from the release again."
        )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise InputError(
                f"{index_path} names {shard!r}, which is not a plain file name; a shard must lie in the "
                "folder itself."
            )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in read_safetensors(folder / shard).items():
            if weight_map.get(name) != shard:
                told = f"says {weight_map[name]}" if name in weight_map else "does not name it"
                raise InputError(
                    f"{folder / shard} holds {name!r} but {INDEX} {told}; copy index and shards from one "
                    "release."
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(
                f"{folder / shard} lacks {name!r}, which {INDEX} promises; copy index and shards from one "
                "release."
            )
    return tensors


def read_torch(path: Path, entry: str) -> dict[str, Tensor]:
    """The tensors of a .pth or .pt file: of its table `entry` if there is one, else of the file itself.

    The file stays memory-mapped, but for one in a bucket, which is held whole; nothing in it is executed.

    Raises:
        InputError: torch is not installed, or the file is missing, damaged, or holds more than plain tensors.
    """
    require_torch_file(path)
    try:
        import torch
    except ImportError:
        raise InputError(
            f"Reading {path.name} needs PyTorch; install it with: pip install 'unibiomed-jax[parity]'."
        ) from None
    content = _load(torch, path)
    if isinstance(content, dict) and isinstance(content.get(entry), dict):
        content = content[entry]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a table of tensors.")
    tensors = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; save the state_dict alone."
            )
        dtype = DTYPES.get(
            {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(value.dtype)
        )
        if dtype is None:
            raise InputError(
                f"{path}: {name!r} holds {value.dtype} numbers; weights must be {', '.join(DTYPES)}."
            )
        tensors[name] = Tensor(dtype, tuple(value.shape), _torch_reader(torch, value, dtype), str(path))
    return tensors


def require_torch_file(path: Path) -> None:
    """Raise InputError unless `path` is a file; a folder of that name is what DeepSpeed leaves."""
    if path.is_dir():
        raise InputError(
            f"{path} is a folder of DeepSpeed shards; join them first with the script inside it: "
            f"python {path / 'zero_to_fp32.py'} {path} {path.with_suffix('')}_whole.pth."
        )
    if not path.is_file():
        raise InputError(f"{path} is missing; give the file with the trained weights.")


def _load(torch, path: Path):
    try:
        if files.in_bucket(path):
            return torch.load(files.open_file(path), map_location="cpu", weights_only=True)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds objects besides tensors, which could run code when read; where you trust the "
            "file, save its state_dict alone: torch.save({'state_dict': "
            "torch.load(FILE, weights_only=False)['state_dict']}, NEW_FILE)."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read ({reason}); copy it again.") from None


def _torch_reader(torch, value, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        tensor = value.detach().contiguous()
        if dtype == DTYPES["BF16"]:
            return tensor.view(torch.int16).numpy().view(dtype)
        return tensor.numpy()

    return read
