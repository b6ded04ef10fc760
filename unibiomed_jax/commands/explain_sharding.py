"""`unibiomed explain-sharding`: what a strategy divides, and what a device holds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from unibiomed_jax.commands.run import DONE
from unibiomed_jax.config.fields import ZERO_OR_MORE
from unibiomed_jax.errors import InputError

if TYPE_CHECKING:
    from unibiomed_jax.config.model import ModelConfig
    from unibiomed_jax.sharding.layout import Layout, ParameterLayout

console = Console()
# Names on the command line -> those of `config.presets.MODELS`.
MODELS = {
    "unibiomed-1b": "unibiomed",
    "unibiomed-3b": "qwen2.5-3b",
    "unibiomed-7b": "qwen2.5-7b",
    "unibiomed-14b": "qwen2.5-14b",
}
# One sample a share of the batch: an image of six tiles and a thumbnail, a row of 2,048 tokens, four masks.
TILES, TOKENS, OBJECTS = 8, 2048, 4


@dataclasses.dataclass(frozen=True)
class ExplainShardingOptions:
    """Say how a strategy divides parameters and activations over a mesh of devices, which need not exist."""

    # Strategies of unibiomed_jax/sharding/strategies.py, one or several.
    strategy: tuple[str, ...]
    # Devices along the axes of the mesh of each: fsdp=4,tensor=2.
    mesh: tuple[str, ...]
    # Sizes of the model.
    model: Literal["unibiomed-1b", "unibiomed-3b", "unibiomed-7b", "unibiomed-14b"] = "unibiomed-1b"
    # "weights": as parameters are kept between uses (bfloat16). "optimizer": as masters are (float32).
    # "computed": as a computation has them.
    use: Literal["weights", "optimizer", "computed"] = "weights"
    # Rank of the adapters that training puts beside the language model's layers; 0: none.
    lora_rank: Annotated[int, ZERO_OR_MORE] = 0
    # Draw it, too: a page with a picture of what every device holds for each strategy.
    svg: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


def explain_sharding(options: ExplainShardingOptions) -> int:
    """Run `unibiomed explain-sharding`."""
    from unibiomed_jax.config.presets import MODELS as SIZES  # JAX starts only when it is needed
    from unibiomed_jax.sharding.layout import Layout, parse_mesh
    from unibiomed_jax.sharding.strategies import find_strategy

    if len(options.strategy) != len(options.mesh):
        raise InputError(
            f"There are {len(options.strategy)} strategies and {len(options.mesh)} meshes; give each one "
            "its own, in the same order."
        )
    model = SIZES[MODELS[options.model]]
    parameters = shapes(model, options.use, options.lora_rank)
    pictures = []
    for strategy, mesh in zip(options.strategy, options.mesh, strict=True):
        layout = Layout.abstractly(find_strategy(strategy), model, parse_mesh(mesh))
        layout.require_useful(parameters, options.use)
        if len(options.strategy) > 1:
            console.print(f"{strategy}, {mesh}:", markup=False, highlight=False, soft_wrap=True)
        for line in lines(layout, model, parameters, options.use):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        title = f"{strategy}, {mesh}, {options.model}"
        pictures.append(drawing(layout, model, parameters, options.use, title))
    if options.svg is not None:
        try:
            options.svg.write_text(page(pictures))
        except OSError as error:
            raise InputError(
                f"{options.svg} cannot be written ({error.strerror}); choose another file."
            ) from None
    return DONE


def lines(layout: Layout, model: ModelConfig, parameters: dict, use: str) -> list[str]:
    """A line for every parameter and main activation, and one with the sum."""
    from unibiomed_jax.sharding.axes import logical_axes

    rows = layout.explain(parameters, use)
    said = []
    for row in sorted(rows, key=lambda row: row.path):
        meanings = logical_axes(row.path, len(row.shape))
        whole = "" if any(row.spec) else "; whole: " + ("; ".join(row.obstacles) or _why_whole(row))
        said.append(
            f"{row.path} [{_axes(meanings, row.spec)}] {_sizes(layout, row.shape, row.spec)} a device, "
            f"{row.bytes_per_device:,} bytes{whole}"
        )
    for name, meanings, shape, itemsize in activations(layout, model):
        spec = layout.activation(shape, meanings)
        local = _local(layout, shape, spec)
        said.append(
            f"({name}) [{_axes([m and m.rpartition('.')[2] for m in meanings], spec)}] "
            f"{'x'.join(map(str, local))} a device, {math.prod(local) * itemsize:,} bytes"
        )
    held = sum(row.bytes_per_device for row in rows)
    total = sum(value.size * value.dtype.itemsize for value in parameters.values())
    said.append(
        f"{held / 2**20:,.1f} MiB of parameters a device; {total / 2**20:,.1f} MiB in all, an equal share is "
        f"{total / layout.mesh.size / 2**20:,.1f} MiB."
    )
    return said


def activations(layout: Layout, model: ModelConfig) -> list[tuple[str, tuple, tuple[int, ...], int]]:
    """The main activations with one sample a share of the batch: name, meanings, shape, bytes of a number."""
    batch = layout.batch_shares
    vision, language, sam2 = model.vision, model.language, model.sam2
    grid = sam2.image_size // 4
    tiles, places = batch * TILES, 1 + vision.grid**2
    row = ("batch", "language.tokens")
    return [
        ("vision stream", ("vision.tiles", None, None), (tiles, places, vision.hidden_size), 2),
        ("language stream", (*row, None), (batch, TOKENS, language.hidden_size), 2),
        (
            "queries",
            (*row, "language.heads", None),
            (batch, TOKENS, language.num_heads, language.head_dim),
            2,
        ),
        (
            "keys, values",
            ("batch", None, "language.kv_heads", None),
            (batch, TOKENS, language.num_kv_heads, language.head_dim),
            2,
        ),
        ("mlp", (*row, "language.mlp"), (batch, TOKENS, language.mlp_dim), 2),
        ("logits of a chunk", (*row, "language.vocab"), (batch, 256, language.padded_vocab_size), 4),
        (
            "trunk, finest map",
            ("sam2.images", None, None, None),
            (batch, grid, grid, sam2.hiera.embed_dim),
            2,
        ),
        ("masks", ("batch", None, None, None, None), (batch, OBJECTS, 1, grid, grid), 4),
    ]


def drawing(layout: Layout, model: ModelConfig, parameters: dict, use: str, title: str) -> tuple[str, int]:
    """A picture and its height: of the largest parameters and the main activations what one device holds."""
    rows = layout.explain(parameters, use)
    largest = sorted(rows, key=lambda row: -math.prod(row.shape))[:16]
    boxes = [(row.path, row.shape, row.spec) for row in largest]
    for name, meanings, shape, _ in activations(layout, model):
        boxes.append((name, shape, layout.activation(shape, meanings)))
    width, height, gap = 420, 16, 44
    parts = [f'<text x="10" y="22" font-size="15">{title}: dark is what one device holds</text>']
    for number, (name, shape, spec) in enumerate(boxes):
        top = 50 + number * gap
        share = math.prod(_local(layout, shape, spec)) / math.prod(shape)
        parts += [
            f'<text x="10" y="{top}">{name} {"x".join(map(str, shape))}: '
            f"{_axes([None] * len(shape), spec)}</text>",
            f'<rect x="10" y="{top + 5}" width="{width}" height="{height}" fill="#d8e2ec"/>',
            f'<rect x="10" y="{top + 5}" width="{width * share:.1f}" height="{height}" fill="#245a8d"/>',
            f'<text x="{width + 20}" y="{top + 18}">1/{round(1 / share)}</text>',
        ]
    return "\n".join(parts), 60 + gap * len(boxes)


def page(pictures: list[tuple[str, int]]) -> str:
    """Pictures with their heights, one below the other."""
    parts, top = [], 0
    for picture, height in pictures:
        parts.append(f'<g transform="translate(0 {top})">\n{picture}\n</g>')
        top += height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{top}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', *parts, "</svg>\n"])


def shapes(model: ModelConfig, use: str, lora_rank: int = 0) -> dict:
    """Every parameter, adapters of a rank included, in the number format that it is kept in."""
    import jax
    import jax.numpy as jnp

    from unibiomed_jax.parameters import abstract_params, matches
    from unibiomed_jax.training.lora import DECODER_LAYERS

    table = {path: leaf.shape for path, leaf in abstract_params(model).items()}
    for path, shape in list(table.items()):
        layer = path.removesuffix(".kernel")
        if lora_rank and layer != path and matches(layer, DECODER_LAYERS):
            *stack, features_in, features_out = shape
            table[f"{layer}.lora.a"] = (*stack, features_in, lora_rank)
            table[f"{layer}.lora.b"] = (*stack, lora_rank, features_out)
    dtype = jnp.float32 if use == "optimizer" else jnp.bfloat16
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in table.items()}


def _why_whole(row: ParameterLayout) -> str:
    if sum(meaning != "layer" for meaning in row.meanings) < 2:
        return "a vector"
    return "the strategy does not divide it"


def _axes(meanings, spec) -> str:
    """The axes with what divides them: layer, embed, mlp/fsdp+tensor."""
    words = []
    for meaning, axes in zip(meanings, spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        words.append((meaning or "-") + ("/" + "+".join(axes) if axes else ""))
    return ", ".join(words)


def _local(layout: Layout, shape, spec) -> tuple[int, ...]:
    from jax.sharding import NamedSharding

    return NamedSharding(layout.mesh, spec).shard_shape(tuple(shape))


def _sizes(layout: Layout, shape, spec) -> str:
    return "x".join(map(str, _local(layout, shape, spec)))
