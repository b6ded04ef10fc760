"""Time and memory of converting a full-size checkpoint, and proof that nothing is lost.

    python benchmarks/conversion.py [--folder /tmp]

makes a random checkpoint with the names and shapes of the release (vision, language: bfloat16; the rest:
float32), converts it, converts it back, and compares the sha256 of every tensor. The same run copies both
folders as plain files. The exit code is 1 if a tensor differs or memory went above its bound. Needs 9 GB of
disk, which it frees again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from unibiomed_jax.config.presets import MODELS
from unibiomed_jax.conversion.reading import DTYPES, read_folder
from unibiomed_jax.conversion.released_config import release_config
from unibiomed_jax.conversion.writing import write_safetensors

ROOT = Path(__file__).parents[1]
# Any tokenizer serves: the numbers are random.
TOKENIZER = ROOT / "tests" / "golden" / "micro" / "checkpoint"
NAMES = ROOT / "tests" / "data" / "weights.tsv"
BFLOAT16 = ("vision_model.", "mlp1.", "language_model.")


@dataclass(frozen=True)
class Args:
    # Where the temporary checkpoints go.
    folder: Path = Path(tempfile.gettempdir())
    # Store every tensor in this number format instead of the release's mix: F32, BF16 or F16.
    dtype: str | None = None


def make(folder: Path, dtype: str | None) -> None:
    """A released checkpoint with random finite numbers."""
    plan = {}
    for line in NAMES.read_text().splitlines()[1:]:
        name, shape, _ = line.split("\t")
        kind = dtype or ("BF16" if name.startswith(BFLOAT16) else "F32")
        plan[name] = (DTYPES[kind], tuple(map(int, shape.split("x"))))
    rng = np.random.default_rng(0)

    def tensors():
        for name, (number, shape) in plan.items():
            size, bits = 8 * number.itemsize, np.dtype(f"u{number.itemsize}")
            # Without the highest exponent bit every pattern is a finite number.
            finite = bits.type((1 << size) - 1 - (1 << size - 2))
            yield name, (rng.integers(0, 1 << size, shape, bits) & finite).view(number)

    folder.mkdir()
    write_safetensors(folder, plan, tensors())
    (folder / "config.json").write_text(json.dumps(release_config(MODELS["unibiomed"])))
    for path in TOKENIZER.iterdir():
        if "token" in path.name:
            shutil.copyfile(path, folder / path.name)


def hashes(folder: Path) -> dict[str, tuple]:
    return {
        name: (str(t.dtype), t.shape, hashlib.sha256(t.read().reshape(-1).view(np.uint8)).hexdigest())
        for name, t in read_folder(folder).items()
    }


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next step reads them from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> float:
    forget(source)
    start = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    return time.perf_counter() - start


def command(module: str, source: Path, target: Path) -> tuple[float, str]:
    """Run a conversion in a process of its own: seconds, start-up included, and its report."""
    forget(source)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, str(source), str(target)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    os.sync()
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, done.stdout.strip()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.folder) as name:
        work = Path(name)
        released, converted, back = work / "released", work / "converted", work / "back"
        make(released, args.dtype)
        rows, peaks = [], []
        for step, run in (
            ("plain copy of the released folder", lambda: (copy(released, work / "copy"), "")),
            ("convert.from_torch", lambda: command("convert.from_torch", released, converted)),
            ("convert.to_torch", lambda: command("convert.to_torch", converted, back)),
            ("plain copy of the converted folder", lambda: (copy(converted, work / "copy"), "")),
        ):
            seconds, report = run()
            shutil.rmtree(work / "copy", ignore_errors=True)
            console.print(report, highlight=False, soft_wrap=True)
            peaks += [float(peak) for peak in re.findall(r"peak memory ([\d.]+) GB", report)]
            rows.append((step, seconds))
        table = Table(title="seconds until everything is on the disk, interpreter start included")
        for title in ("step", "seconds", "GB/s"):
            table.add_column(title, justify="left" if title == "step" else "right")
        for step, seconds in rows:
            table.add_row(step, f"{seconds:.1f}", f"{size(released) / 1e9 / seconds:.2f}")
        console.print(table)
        bound = 1.25 * max(size(released), size(converted)) / 1e9
        console.print(
            f"released {size(released) / 1e9:.2f} GB, converted {size(converted) / 1e9:.2f} GB; peak memory "
            f"{max(peaks):.2f} GB, the bound, 1.25 times the larger, is {bound:.2f} GB"
        )
        before, after = hashes(released), hashes(back)
        same = sum(before[tensor] == after.get(tensor) for tensor in before)
        console.print(f"{same:,} of {len(before):,} tensors are bit-equal after the way there and back")
        sys.exit(0 if same == len(before) == len(after) and len(peaks) == 2 and max(peaks) < bound else 1)


if __name__ == "__main__":
    main()
