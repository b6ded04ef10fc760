"""From PyTorch checkpoints to the folder that inference and training read.

A source is one of
  a released UniBiomed folder (safetensors, config.json, tokenizer);
  a training .pth, with --base the weights it was trained from (and --sam2, if those are InternVL2.5);
  an InternVL2.5 folder, with --sam2 sam2_hiera_large.pt: the weights that training starts from.
A folder may be one that the Hugging Face hub has, as `owner/name[@revision]`; see `hub`.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np

from unibiomed_jax import checkpoint
from unibiomed_jax.conversion import hub, sources
from unibiomed_jax.conversion.assemble import build_leaf, build_parts
from unibiomed_jax.conversion.options import FromTorchOptions
from unibiomed_jax.conversion.reading import DTYPE_NAMES, require_torch_file
from unibiomed_jax.conversion.sources import Source
from unibiomed_jax.conversion.tokenizer_files import add_unibiomed_tokens, check_tokenizer
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import locate, new_folder, require_space
from unibiomed_jax.inputs.tokenizer import copy_tokenizer
from unibiomed_jax.parameters import unflatten


def open_source(options: FromTorchOptions) -> Source:
    """Read names, shapes and configuration of what is to be converted, and judge them.

    Raises:
        InputError: it is incomplete, damaged, of an unknown kind, cannot be downloaded, or options do not fit
            it.
    """
    if (file := locate(options.src)).suffix in (".pth", ".pt"):
        require_torch_file(file)
        if options.base is None:
            raise InputError(
                f"{file} holds only what training changed; add what it was trained from with --base."
            )
        return sources.trained(
            file,
            hub.local(options.base),
            options.sam2,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            keep_lora=options.keep_lora,
        )
    if options.base is not None or options.keep_lora:
        raise InputError(
            f"--base and --keep-lora go with a training .pth, which {options.src} is not; leave them out."
        )
    src = hub.local(options.src)
    if checkpoint.is_checkpoint(src):
        raise InputError(f"{options.src} is a converted checkpoint already; use it as it is.")
    if options.sam2 is not None:
        return sources.starting_weights(src, options.sam2, options.seed)
    return sources.released(src)


def convert(source: Source, dst: Path, *, overwrite: bool = False) -> str:
    """Write a source as a checkpoint folder; it appears complete or not at all.

    Returns:
        The sha256 that identifies the weights.

    Raises:
        InputError: `dst` exists or cannot be written, or the disk is too small.
    """
    require_space(dst, size(source))
    with new_folder(dst, overwrite=overwrite) as folder:
        copy_tokenizer(source.folder, folder / "tokenizer")
        if source.first_new_token is not None:
            add_unibiomed_tokens(folder / "tokenizer", source.first_new_token)
        check_tokenizer(folder / "tokenizer", source.config.language.vocab_size)
        _write_release(source, folder / "release")
        # Closed here, with the threads that build, and not by the garbage collector at its own moment.
        with contextlib.closing(build_parts(source.rows, source.tensors)) as parts:
            return checkpoint.write(folder, source.config, parts, lora=source.lora)


def _write_release(source: Source, folder: Path) -> None:
    """What the way back needs besides the weights: number formats, config.json, the release's own code."""
    folder.mkdir()
    stored = {
        "stores_tied_head": source.stores_tied_head,
        "dtypes": {name: DTYPE_NAMES[tensor.dtype] for name, tensor in source.tensors.items()},
    }
    (folder / "layout.json").write_text(json.dumps(stored, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(source.release_config, indent=2) + "\n")
    for path in source.folder.iterdir():
        if path.suffix == ".py" or path.name == "generation_config.json":
            (folder / path.name).write_bytes(path.read_bytes())


def size(source: Source) -> int:
    """Bytes of all tensors."""
    return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in source.tensors.values())


def read_released(folder: Path, sharding: checkpoint.Sharding | None = None) -> checkpoint.Checkpoint:
    """A released folder in memory, as `checkpoint.load` would return it once converted.

    Args:
        folder: with config.json, safetensors and the tokenizer.
        sharding: where each parameter goes, one after the other; None: all stay on the host.

    Raises:
        InputError: the folder is incomplete, damaged or of an unsupported kind.
    """
    source = sources.released(locate(folder))
    check_tokenizer(source.folder, source.config.language.vocab_size)
    if sharding is None:
        params = {part: unflatten(leaves) for part, leaves in build_parts(source.rows, source.tensors)}
        identity = checkpoint.hash_of(params)
    else:
        leaves, records = {}, {}
        for row in source.rows:
            host = build_leaf(row, source.tensors)
            records[row.path] = checkpoint.leaf_record(host)
            leaves[row.path] = checkpoint.placed(row.path, host, sharding)
            del host
        params, identity = unflatten(leaves), checkpoint.identity(records)
    return checkpoint.Checkpoint(source.config, params, source.folder, identity, None)
