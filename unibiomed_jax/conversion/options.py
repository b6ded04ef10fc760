"""What the conversion can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unibiomed_jax.config.fields import Address

# How a folder is asked for that may also be a repository of the Hugging Face hub (see `hub.repository`).
SOURCE = tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")


@dataclass(frozen=True)
class FromTorchOptions:
    """Convert a PyTorch checkpoint into the folder that inference and training read."""

    # The checkpoint: a released or an InternVL2.5 folder, here or on Hugging Face, or a training .pth.
    src: Annotated[str | Path, tyro.conf.Positional, SOURCE]
    # The folder to create.
    dst: Annotated[Address, tyro.conf.Positional]
    # The weights a training .pth was trained from: a released or an InternVL2.5 folder, here or there.
    base: Annotated[str | Path | None, SOURCE] = None
    # The SAM 2.0 file that goes with an InternVL2.5 folder.
    sam2: Address | None = None
    # Leave the adapters of a training .pth apart instead of merging them.
    keep_lora: bool = False
    # Rank and alpha of the adapters; alpha is not stored in the file.
    lora_rank: int = 128
    lora_alpha: float = 256.0
    # Seed of the weights that InternVL2.5 and SAM2 lack (five embeddings, text_hidden_fcs).
    seed: int = 0
    # Replace DST if it exists.
    overwrite: bool = False


@dataclass(frozen=True)
class ToTorchOptions:
    """Write a converted checkpoint in the released layout."""

    # The converted checkpoint.
    src: Annotated[Address, tyro.conf.Positional]
    # The folder to create.
    dst: Annotated[Address, tyro.conf.Positional]
    # Write adapters that are kept apart as a PEFT adapter in DST/adapter instead of merging them.
    adapter: bool = False
    # Write the weights although some settings (the size of SAM2's image, limits of tiles) would be lost.
    lossy: bool = False
    # Replace DST if it exists.
    overwrite: bool = False


@dataclass(frozen=True)
class VerifyOptions:
    """Compare two checkpoints, released or converted, module by module."""

    # A released or a converted folder.
    a: Annotated[Address, tyro.conf.Positional]
    # Another one.
    b: Annotated[Address, tyro.conf.Positional]
    # Compare only the numbers, not what the modules compute.
    weights_only: bool = False
