"""How far the number formats of a policy move words and masks, against float32, with random weights.

    python benchmarks/precision.py [--size full] [--policies fast bfloat16] [--tiles 1 10] [--pictures 3]

The pictures are real (sample_data). Every answer has the same words, dictated, so that every policy is asked
for the next token and for the masks in the same place. A token counts where float32's two likeliest are
further apart than MARGIN: nearer ones are decided by rounding in any implementation. Every policy runs in a
process of its own, one after the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from PIL import Image
from random_model import PROMPT, random_model, seg_steps
from rich.console import Console
from rich.table import Table

from unibiomed_jax import Request
from unibiomed_jax.config.precision import PrecisionName

ROOT = Path(__file__).parents[1]
PICTURES = (
    "sample_data/msd_spleen_ct/test/10024_spleen_59.jpg",
    "sample_data/idrid_fundus/test/IDRiD_05.jpg",
    "sample_data/hc18_fetal_head/test/1044.jpg",
)
# Pixels, (width, height), of which so many tiles are cut.
SIDES = {1: (410, 410), 10: (1024, 1024)}
NEW_TOKENS, SEGMENTS = 24, 3
# Difference of float32's two highest logits, in their standard deviations.
MARGIN = 0.02


@dataclass(frozen=True)
class Args:
    """Compare policies."""

    size: str = "full"
    # Which, beside float32.
    policies: tuple[PrecisionName, ...] = ("fast", "bfloat16")
    tiles: tuple[int, ...] = (1, 10)
    pictures: int = len(PICTURES)
    # Used within: run one policy and write what it gives there.
    only: PrecisionName | None = None
    out: Path | None = None


def answer_all(args: Args) -> None:
    """Next tokens, their margins, states, masks and seconds of one policy, written to `args.out`."""
    model = random_model(args.size, args.only)
    network = nnx.merge(model.graphdef, model.params)
    word = model.tokenizer.encode(" liver")[0]
    forced = dict.fromkeys(range(NEW_TOKENS), word)
    forced |= dict.fromkeys(seg_steps(SEGMENTS, NEW_TOKENS), model.tokenizer.seg_id)
    found, seconds = {}, {}
    for tiles in args.tiles:
        for number, picture in enumerate(PICTURES[: args.pictures]):
            with Image.open(ROOT / picture) as image:
                opened = model.open(image.convert("RGB").resize(SIDES[tiles], Image.Resampling.BICUBIC))
            begin = time.perf_counter()
            answering = model._start([Request(PROMPT, opened, forced=forced)], NEW_TOKENS, None, None)
            *_, _ = model._looks(answering, NEW_TOKENS)
            (answer,) = model._finish(answering, hide_absent=False)
            case = f"{tiles}/{number}"
            seconds[case] = time.perf_counter() - begin
            states = answering.state.hidden[0, : NEW_TOKENS - 1]
            logits = np.asarray(network.language_model.logits(states), np.float32)
            second, first = np.sort(logits, axis=1)[:, -2:].T
            found[f"{case}/states"] = np.asarray(states.astype(jnp.float32))
            found[f"{case}/ids"] = logits.argmax(axis=1)
            found[f"{case}/margins"] = (first - second) / logits.std(axis=1)
            found[f"{case}/masks"] = np.stack([segment.mask for segment in answer.segments])
    np.savez(args.out, **found)
    args.out.with_suffix(".json").write_text(json.dumps(seconds))


def compare(exact: dict, other: dict, case: str) -> tuple[float, int, int, float]:
    """Relative error of the states, tokens that count and those of them that are equal, least IoU."""
    states, masks, ids = (
        [found[f"{case}/{name}"] for found in (exact, other)] for name in ("states", "masks", "ids")
    )
    error = np.abs(states[1] - states[0]).mean() / np.abs(states[0]).mean()
    counts = exact[f"{case}/margins"] > MARGIN
    both, either = (op(*masks).sum((1, 2)) for op in (np.logical_and, np.logical_or))
    ious = np.where(either > 0, both / np.maximum(either, 1), 1)
    return float(error), int(counts.sum()), int((counts & (ids[0] == ids[1])).sum()), float(ious.min())


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.only:
        answer_all(args)
        return
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        results, seconds = {}, {}
        for policy in ("float32", *args.policies):
            out = Path(folder) / f"{policy}.npz"
            options = [
                "--size",
                args.size,
                "--tiles",
                *map(str, args.tiles),
                "--pictures",
                str(args.pictures),
            ]
            subprocess.run(
                [sys.executable, __file__, *options, "--only", policy, "--out", str(out)], check=True
            )
            with np.load(out) as arrays:
                results[policy] = dict(arrays)
            seconds[policy] = json.loads(out.with_suffix(".json").read_text())
    table = Table("policy", "case", "states off", "ids that count", "equal", "least IoU", "seconds")
    for policy in args.policies:
        for case in seconds[policy]:
            error, counted, equal, iou = compare(results["float32"], results[policy], case)
            table.add_row(
                policy,
                case,
                f"{error:.1e}",
                str(counted),
                str(equal),
                f"{iou:.5f}",
                f"{seconds[policy][case]:.1f} ({seconds['float32'][case]:.1f} in float32)",
            )
    console.print(table)


if __name__ == "__main__":
    main()
