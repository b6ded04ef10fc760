"""From a converted checkpoint to the released layout.

Names, shapes and number formats are those of the release, the vocabulary has its original size, and tokenizer
and config.json lie beside, so that the original code loads the folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import numpy as np

from unibiomed_jax import checkpoint
from unibiomed_jax.checkpoint import Manifest
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.conversion.assemble import split_leaf
from unibiomed_jax.conversion.peft import save_peft_adapter
from unibiomed_jax.conversion.reading import DTYPES, read_json
from unibiomed_jax.conversion.released_config import release_config, unsaid
from unibiomed_jax.conversion.rows import Row
from unibiomed_jax.conversion.tables import largest_first, model_rows
from unibiomed_jax.conversion.tables.qwen2 import TORCH_EMBEDDING, TORCH_HEAD, lora_rows
from unibiomed_jax.conversion.writing import SHARD_BYTES, write_safetensors
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import local_folder, new_folder, require_space
from unibiomed_jax.parameters import merge_adapters
from unibiomed_jax.stored_arrays import dtype_of

Plan = dict[str, tuple[np.dtype, tuple[int, ...]]]


def convert(
    src: Path,
    dst: Path,
    *,
    adapter: bool = False,
    lossy: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Write the checkpoint folder `src` as a released one; it appears complete or not at all.

    Args:
        adapter: write adapters that are kept apart for PEFT, in `adapter/`, instead of merging them.
        lossy: write the weights although some settings have no place in the released layout.
        shard_bytes: size above which the weights are cut into several files.

    Returns:
        Number format and shape of every tensor written.

    Raises:
        InputError: `src` is damaged or has settings that would be lost, `adapter` is asked for where there is
            none, `dst` exists, or the disk is full.
    """
    config, manifest = checkpoint.read_config(src), checkpoint.read_manifest(src)
    if adapter and manifest.lora is None:
        raise InputError(f"{src} has no adapters apart from its kernels; leave out --adapter.")
    lost = unsaid(config)
    if lost and not lossy:
        raise InputError(
            f"{src} has what the released layout cannot say: {'; '.join(lost)}. Set it back, or write the "
            "weights all the same with --lossy."
        )
    rows = model_rows(config)
    extra = lora_rows(config.language, manifest.lora.rank) if manifest.lora else []
    checkpoint.check_shapes(manifest.shapes, {row.path: row.leaf_shape for row in rows + extra}, str(src))
    stored = _read_layout(src)
    plan = {
        name: (_dtype(stored, name, manifest.leaves[row.path]["dtype"]), row.shape)
        for row in rows
        for name in row.names
    }
    if stored["stores_tied_head"]:
        plan[TORCH_HEAD] = plan[TORCH_EMBEDDING]
    require_space(dst, sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in plan.values()))
    with new_folder(dst, overwrite=overwrite) as whole, local_folder(whole) as folder:
        _copy_files(src, folder, config)
        merge = manifest.lora.scale if manifest.lora and not adapter else None
        # Closed here, with the thread that reads ahead, and not by the garbage collector at its own moment.
        with contextlib.closing(_tensors(src, manifest, rows, plan, merge)) as tensors:
            write_safetensors(folder, plan, tensors, shard_bytes=shard_bytes)
        if adapter:
            _write_adapter(src, folder / "adapter", manifest)
    return plan


def _read_layout(src: Path) -> dict:
    path = src / "release" / "layout.json"
    return read_json(path) if path.exists() else {"stores_tied_head": False, "dtypes": {}}


def _dtype(stored: dict, name: str, otherwise: str) -> np.dtype:
    if name in stored["dtypes"]:
        return DTYPES[stored["dtypes"][name]]
    return dtype_of(otherwise)


def _tensors(
    src: Path, manifest: Manifest, rows: list[Row], plan: Plan, scale: float | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the plan, part by part."""
    dtypes = {name: dtype for name, (dtype, _) in plan.items()}
    for part_rows, leaves in _parts(src, manifest, rows, scale):
        for row in part_rows:
            leaf = leaves.pop(row.path.partition(".")[2])
            for name, tensor in split_leaf(row, leaf, dtypes):
                yield name, tensor
                if (
                    name == TORCH_EMBEDDING
                    and TORCH_HEAD in plan
                    and not any(TORCH_HEAD in r.names for r in part_rows)
                ):
                    yield TORCH_HEAD, tensor


def _parts(
    src: Path, manifest: Manifest, rows: list[Row], scale: float | None
) -> Iterator[tuple[list[Row], dict[str, np.ndarray]]]:
    """Rows and merged leaves of every part of the checkpoint; the next is read while one is being used."""
    parts = largest_first(rows)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(checkpoint.read_part, src, parts[0][0], manifest)
        for (_, part_rows), following in zip_longest(parts, parts[1:]):
            leaves = reading.result()
            if scale is not None:
                leaves = merge_adapters(leaves, scale)
            if following:
                reading = reader.submit(checkpoint.read_part, src, following[0], manifest)
            yield part_rows, leaves
            del leaves


def _copy_files(src: Path, folder: Path, config: ModelConfig) -> None:
    if not (src / "tokenizer").is_dir():
        raise InputError(f"{src} is not a complete checkpoint (tokenizer/ is missing); {checkpoint.REMEDY}.")
    for path in (src / "tokenizer").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    original = None
    for path in (src / "release").iterdir() if (src / "release").is_dir() else ():
        if path.name == "config.json":
            original = read_json(path)
        elif path.name != "layout.json":
            (folder / path.name).write_bytes(path.read_bytes())
    text = json.dumps(release_config(config, original), indent=2)
    (folder / "config.json").write_text(text + "\n")


def missing_code(folder: Path) -> list[str]:
    """Files of the original code that config.json names and a released folder lacks."""
    names = read_json(folder / "config.json").get("auto_map", {}).values()
    # With "--" a name is that of another repository.
    files = sorted({f"{n.partition('.')[0]}.py" for n in names if isinstance(n, str) and "--" not in n})
    return [file for file in files if not (folder / file).exists()]


def _write_adapter(src: Path, folder: Path, manifest: Manifest) -> None:
    leaves = checkpoint.read_part(src, "language_model", manifest)
    parameters = {f"language_model.{path}": leaf for path, leaf in leaves.items()}
    save_peft_adapter(folder, parameters, rank=manifest.lora.rank, alpha=manifest.lora.alpha, dropout=0.0)
