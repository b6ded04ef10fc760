"""`unibiomed export`: the model as files that run with jax and numpy alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from unibiomed_jax.commands.run import DONE
from unibiomed_jax.config.fields import ONE_OR_MORE, require_limits
from unibiomed_jax.config.precision import PrecisionName
from unibiomed_jax.errors import InputError

console = Console()


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write an answer about an image as one program, and its stages, with weights, tokenizer and a loader."""

    # A converted or a released folder, or a repository on Hugging Face.
    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")]
    # Where the files go; a folder that is not there yet.
    out: Path
    # What will run them.
    target: Literal["cpu", "cuda", "tpu"]
    # Answers at a time.
    batch: Annotated[int, ONE_OR_MORE] = 1
    # Tiles of an image, with its thumbnail; tokens of a question, with those of the tiles, and of an answer;
    # masks of an answer.
    tiles: Annotated[int, ONE_OR_MORE] = 5
    tokens: Annotated[int, ONE_OR_MORE] = 1536
    new_tokens: Annotated[int, ONE_OR_MORE] = 256
    objects: Annotated[int, ONE_OR_MORE] = 4
    # "auto": bfloat16, as the reference; float32 on a CPU. "fast": coarser, where a CPU multiplies bfloat16.
    precision: PrecisionName = "auto"


def export(options: ExportOptions) -> int:
    """Run `unibiomed export`."""
    require_limits(options, "--")
    if options.out.exists():
        raise InputError(f"{options.out} is there already; choose another folder.")
    try:
        import flatbuffers  # noqa: F401 (jax.export writes with it)
    except ModuleNotFoundError:
        raise InputError(
            "Exporting needs flatbuffers; install the extra: pip install 'unibiomed-jax[export]'."
        ) from None
    from unibiomed_jax.config.precision import find_precision
    from unibiomed_jax.conversion import loading
    from unibiomed_jax.inference.export import PLATFORMS, Sizes, export_folder

    sizes = Sizes(options.batch, options.tiles, options.tokens, options.new_tokens, options.objects)
    precision = find_precision(options.precision, PLATFORMS[options.target])
    export_folder(loading.load(options.checkpoint), options.out, options.target, sizes, precision)
    console.print(f"{options.out} runs on {options.target}: see load.py and manifest.json in it.")
    return DONE
