"""Seconds of every stage of a prediction, and what share of the machine's measured ceiling that is.

    python benchmarks/predict.py [--precision auto|float32|bfloat16] [--repeats 3] [--json FILE]

A full-size model with random weights answers in 24 tokens: one and four images, one and five `[SEG]`, and
a large image of seven tiles. Nothing is taken from the compilation cache, so that the first call shows
what compiling costs. The ceiling of a stage is the time that its arithmetic would take at the rate of a
large matrix product in the same format, or the reading of its weights (while decoding: also of keys and
values) at the rate of a large sum or matrix-vector product, whichever is longer; both rates are measured
at the start.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cost
import jax
import jax.numpy as jnp
import tyro
from random_model import describe, question, random_model
from rich.console import Console
from rich.table import Table

from unibiomed_jax import UniBiomed
from unibiomed_jax.config.precision import FLOAT32, PrecisionName
from unibiomed_jax.inference.cpu import EXACT_PARTS, FAST_PARTS

NEW_TOKENS = 24
# (title, images, [SEG] per image, (width, height)); 1344x896 pixels make 3x2 tiles and a thumbnail.
CASES = (
    ("1 image, 1 [SEG]", 1, 1, (410, 410)),
    ("1 image, 5 [SEG]", 1, 5, (410, 410)),
    ("4 images, 1 [SEG] each", 4, 1, (410, 410)),
    ("4 images, 5 [SEG] each", 4, 5, (410, 410)),
    ("1 large image, 1 [SEG]", 1, 1, (1344, 896)),
)


@dataclass(frozen=True)
class Args:
    # "full": UniBiomed-1B; "micro": only to see that this works.
    size: Literal["full", "micro"] = "full"
    # "auto" is what the library chooses on this backend.
    precision: PrecisionName = "auto"
    # Warm calls; their median is shown.
    repeats: int = 3
    # Which of the five cases to measure.
    cases: tuple[Literal[1, 2, 3, 4, 5], ...] = (1, 2, 3, 4, 5)
    # Folder with the tokenizer of a checkpoint; by default the one that the tests use.
    tokenizer: Path | None = None
    # Write all numbers there, too.
    json: Path | None = None


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches when it does nothing else."""

    # FLOP/s of a large matrix product by format.
    flops: dict[str, float]
    # Bytes read per second.
    bytes: float

    def seconds(self, work: cost.Work, read: float) -> tuple[float, str]:
        """The least time a stage can take, and what bounds it."""
        matmul = sum(amount / self.flops[dtype] for dtype, amount in work.items())
        memory = read / self.bytes
        return max((matmul, "matmul"), (memory, "memory"))


def best_seconds(function, *arguments) -> float:
    """The fastest of ten calls."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure_ceilings() -> Ceilings:
    on_cpu = jax.default_backend() == "cpu"
    # A CPU does best on products that its cache holds: the rate is that of the best shape.
    shapes = [(1024, 1024, 4096), (2048, 2048, 2048)] if on_cpu else [(8192, 8192, 8192)]
    cells = 2**27 if on_cpu else 2**30
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32, precision="highest"))
    flops = dict.fromkeys(("float32", "bfloat16"), 0.0)
    for dtype in flops:
        for rows, inner, columns in shapes:
            a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
            flops[dtype] = max(flops[dtype], 2 * rows * inner * columns / best_seconds(product, a, b))
    table = jnp.ones((cells // 8192, 8192), jnp.float32)
    reads = best_seconds(jax.jit(jnp.sum), table), best_seconds(jax.jit(jnp.matmul), table, table[0])
    return Ceilings(flops, table.nbytes / min(reads))


def stage_work(model: UniBiomed, images: int, segments: int, tiles: int, tokens: int) -> dict:
    """Of every stage: its unit of work, how many of them, FLOPs, and bytes that must be read."""
    config, precision, params = model.config, model.precision, model.params

    def stored(*parts) -> int:
        return sum(leaf.nbytes for part in parts for leaf in jax.tree.leaves(part))

    def times(work: cost.Work, count: float) -> cost.Work:
        return {dtype: amount * count for dtype, amount in work.items()}

    language, sam2 = params["language_model"], params["sam2"]
    # The embedding is looked up row by row; it is read whole only where it is the output head as well.
    weights = stored(language)
    if not config.language.tie_word_embeddings:
        weights -= stored(language["embed_tokens"])
    steps = NEW_TOKENS - 1
    cache = images * cost.cache_bytes(config, precision, tokens + NEW_TOKENS // 2)
    vision, encoder = stored(params["vision_model"], params["mlp1"]), stored(sam2["image_encoder"])
    decoder = stored(sam2["sam_mask_decoder"])
    parts = 0
    if precision.language == "float32" and any(x.dtype == "bfloat16" for x in jax.tree.leaves(language)):
        parts = EXACT_PARTS if precision == FLOAT32 else FAST_PARTS
    tile, image = cost.encode_tile(config, precision), cost.encode_image(config, precision)
    prompt = cost.prefill(config, precision, tokens, parts)
    masks = cost.decode_masks(config, precision, segments)
    return {
        "encode tiles": ("tile", images * tiles, times(tile, images * tiles), vision),
        "prefill": ("token", images * tokens, times(prompt, images), weights),
        "decode": ("token", images * steps, {}, steps * (weights + cache)),
        "encode image": ("image", images, times(image, images), images * encoder),
        "decode masks": ("[SEG]", images * segments, times(masks, images), images * decoder),
    }


def run(model: UniBiomed, images: int, segments: int, size: tuple[int, int]) -> dict[str, float]:
    """Seconds of one call, whole and by stage, from the opened image files to masks of their size."""
    requests = [question(model, segments, NEW_TOKENS, size, seed) for seed in range(images)]
    begin = time.perf_counter()
    answers = model.predict_batch(requests, max_new_tokens=NEW_TOKENS)
    whole = time.perf_counter() - begin
    assert all(len(answer.segments) == segments for answer in answers)
    return {**answers[0].seconds, "whole call": whole}


def measure(model: UniBiomed, ceilings: Ceilings, case: tuple, repeats: int) -> dict:
    title, images, segments, size = case
    asked = question(model, segments, NEW_TOKENS, size)
    opened = model.open(asked.image)
    tokens, tiles = len(model.prompt_of(type(asked)(asked.prompt, opened)).ids), len(opened.tiles)
    works = stage_work(model, images, segments, tiles, tokens)
    first = run(model, images, segments, size)
    warm = [run(model, images, segments, size) for _ in range(repeats)]
    stages = {}
    for stage in first:
        seconds = [call[stage] for call in warm]
        stages[stage] = {"first": first[stage], "warm": statistics.median(seconds), "calls": seconds}
        if stage in works:
            unit, count, work, read = works[stage]
            least, bound = ceilings.seconds(work, read)
            share = least / stages[stage]["warm"]
            stages[stage] |= dict(unit=unit, count=count, flops=work, bytes=read, bound=bound, share=share)
    return {"case": title, "prompt_tokens": tokens, "tiles": tiles, "stages": stages, "peak": peak_bytes()}


def peak_bytes() -> dict[str, int]:
    """The most memory this process has held so far, on the host and on the device where that is another."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"host": host} if device is None else {"host": host, "device": device}


def table_of(result: dict) -> Table:
    peak = ", ".join(f"{place} {size / 1e9:.1f} GB" for place, size in result["peak"].items())
    title = f"{result['case']}: {result['tiles']} tiles, prompt of {result['prompt_tokens']} tokens each"
    whole = result["stages"]["whole call"]
    compiling = f"the first call took {whole['first'] - whole['warm']:.1f} s longer: it compiles"
    table = Table(title=title, caption=f"peak memory so far: {peak}; {compiling}")
    table.add_column("stage")
    for column in ("first, s", "warm, s", "a unit", "reached", "ceiling", "share"):
        table.add_column(column, justify="right")
    for stage, row in result["stages"].items():
        cells = [f"{row['first']:.3f}", f"{row['warm']:.3f}"]
        if "unit" in row:
            seconds, memory = row["warm"], row["bound"] == "memory"
            each = seconds / row["count"]
            tokens = row["unit"] == "token"
            cells.append(
                f"{1 / each:,.1f} tokens/s" if tokens else f"{each:.4f} s/{row['unit']}".replace("[", r"\[")
            )
            amount = row["bytes"] if memory else sum(row["flops"].values())
            cells.append(f"{amount / seconds / 1e9:,.1f} {'GB/s' if memory else 'GFLOP/s'}")
            cells += [row["bound"], f"{row['share']:.0%}"]
        table.add_row(stage, *cells, style="bold" if stage == "whole call" else None)
    return table


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    jax.config.update("jax_enable_compilation_cache", False)
    console = Console(width=110)
    begin = time.perf_counter()
    model = random_model(args.size, args.precision, args.tokenizer)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    ceilings = measure_ceilings()
    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    console.print(
        f"{machine}, Python {platform.python_version()}; {describe(model.precision)}", highlight=False
    )
    console.print(
        f"parameters {stored / 1e9:.2f} GB, ready after {time.perf_counter() - begin:.0f} s; ceilings: "
        + ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in ceilings.flops.items())
        + f", memory {ceilings.bytes / 1e9:,.1f} GB/s",
        highlight=False,
    )
    report = dict(
        machine=machine, precision=describe(model.precision), parameters=stored, new_tokens=NEW_TOKENS
    )
    report |= dict(ceilings={**ceilings.flops, "memory": ceilings.bytes}, cases=[])
    for number in args.cases:
        result = measure(model, ceilings, CASES[number - 1], args.repeats)
        console.print(table_of(result))
        report["cases"].append(result)
        if args.json:  # after every case, so that an interrupted run keeps what it has
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
