"""Convert a PyTorch checkpoint: python -m convert.from_torch SRC DST

SRC is one of
  a released UniBiomed folder (safetensors, config.json, tokenizer);
  a training .pth, with --base the weights it was trained from (and --sam2, if those are InternVL2.5);
  an InternVL2.5 folder, with --sam2 sam2_hiera_large.pt: the weights that training starts from.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from convert import command, sources
from convert.assemble import build_parts
from convert.reading import DTYPE_NAMES, require_torch_file
from convert.sources import Source
from convert.tokenizer_files import add_unibiomed_tokens, check_tokenizer
from unibiomed_jax import checkpoint
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import new_folder, require_space
from unibiomed_jax.inference.tokenizer import copy_tokenizer


@dataclass(frozen=True)
class Args:
    """Convert a PyTorch checkpoint into the folder that inference and training read."""

    # The checkpoint: a released folder, a training .pth, or an InternVL2.5 folder.
    src: Annotated[Path, tyro.conf.Positional]
    # The folder to create.
    dst: Annotated[Path, tyro.conf.Positional]
    # The weights a training .pth was trained from: a released or an InternVL2.5 folder.
    base: Path | None = None
    # The SAM 2.0 file that goes with an InternVL2.5 folder.
    sam2: Path | None = None
    # Leave the adapters of a training .pth apart instead of merging them.
    keep_lora: bool = False
    # Rank and alpha of the adapters; alpha is not stored in the file.
    lora_rank: int = 128
    lora_alpha: float = 256.0
    # Seed of the weights that InternVL2.5 and SAM2 lack (five embeddings, text_hidden_fcs).
    seed: int = 0
    # Replace DST if it exists.
    overwrite: bool = False


def open_source(args: Args) -> Source:
    """Read names, shapes and configuration of what is to be converted, and judge them.

    Raises:
        InputError: it is incomplete, damaged, of an unknown kind, or options do not fit it.
    """
    if args.src.suffix in (".pth", ".pt"):
        require_torch_file(args.src)
        if args.base is None:
            raise InputError(
                f"{args.src} holds only what training changed; add what it was trained from with --base."
            )
        return sources.trained(
            args.src,
            args.base,
            args.sam2,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            keep_lora=args.keep_lora,
        )
    if args.base is not None or args.keep_lora:
        raise InputError(
            f"--base and --keep-lora go with a training .pth, which {args.src} is not; leave them out."
        )
    if args.sam2 is not None:
        return sources.starting_weights(args.src, args.sam2, args.seed)
    return sources.released(args.src)


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
    layout = {
        "stores_tied_head": source.stores_tied_head,
        "dtypes": {name: DTYPE_NAMES[tensor.dtype] for name, tensor in source.tensors.items()},
    }
    (folder / "layout.json").write_text(json.dumps(layout, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(source.release_config, indent=2) + "\n")
    for path in [*source.folder.glob("*.py"), source.folder / "generation_config.json"]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def size(source: Source) -> int:
    """Bytes of all tensors."""
    return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in source.tensors.values())


def read_released(folder: Path) -> checkpoint.Checkpoint:
    """A released folder in memory, as `checkpoint.load` would return it once converted.

    Raises:
        InputError: the folder is incomplete, damaged or of an unsupported kind.
    """
    source = sources.released(Path(folder))
    check_tokenizer(source.folder, source.config.language.vocab_size)
    params = {part: checkpoint.unflatten(leaves) for part, leaves in build_parts(source.rows, source.tensors)}
    return checkpoint.Checkpoint(source.config, params, Path(folder), checkpoint.hash_of(params), None)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    start = time.perf_counter()
    source = open_source(args)
    digest = convert(source, args.dst, overwrite=args.overwrite)
    seconds = time.perf_counter() - start
    count = sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    print(
        f"Converted {len(source.tensors):,} tensors, {count:,} numbers, {size(source) / 1e9:.2f} GB in "
        f"{seconds:.1f} s ({size(source) / 1e9 / seconds:.2f} GB/s), peak memory "
        f"{command.peak_memory() / 1e9:.2f} GB.\nWeights {digest[:16]} are in {args.dst}."
    )
    for part in source.from_base:
        print(f"{args.src} holds nothing of {part}*, which training changes: it is that of {args.base}.")


if __name__ == "__main__":
    command.run(main)
