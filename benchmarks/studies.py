"""Memory and time of a question about a study, stage by stage.

    python benchmarks/studies.py                    # 24 slices of 512x512, random weights at full size
    python benchmarks/studies.py --checkpoint checkpoints/unibiomed-tiny --slices 800

Without `--checkpoint` random weights are stored as the release stores its own, with a head that often says
[SEG]; that needs 3 GB of disk, which it frees again, or `--keep FOLDER`, which the next run takes. Memory is
what Linux counts as resident, of one process that does nothing else.
"""

from __future__ import annotations

import lzma
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from qwen2_tokenizer import FILES
from random_model import SIZES, random_parameters

from unibiomed_jax import Study, UniBiomed, checkpoint, write_study
from unibiomed_jax.config.precision import PrecisionName, find_precision
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.studies.study import Geometry

QUESTION = "Please segment the liver in abdomen CT."


@dataclass(frozen=True)
class Options:
    """Ask a made-up CT one question and print the peak of memory in every stage."""

    # Slices of the study, of 512x512 pixels.
    slices: int = 24
    # A converted checkpoint to ask; by default random weights of a size.
    checkpoint: Path | None = None
    size: Literal["full", "micro"] = "full"
    # A folder for the random weights, made if it is not there.
    keep: Path | None = None
    conditioning: Literal["auto", "first", "each"] = "auto"
    precision: PrecisionName = "auto"
    batch_size: int = 4
    max_new_tokens: int = 16
    # Masks that the answer ends with.
    max_masks: int = 1


class Peaks:
    """The most memory in each stage, and its seconds."""

    def __init__(self):
        self._begin = time.perf_counter()
        print("| stage | peak, GB | at its end, GB | seconds |\n|---|---|---|---|", flush=True)

    def end(self, stage: str) -> None:
        """Print what was needed since the last stage ended."""
        now, (peak, left) = time.perf_counter(), (_status(name) for name in ("VmHWM", "VmRSS"))
        print(f"| {stage} | {peak:.2f} | {left:.2f} | {now - self._begin:.0f} |", flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # the next peak starts from what is held now
        self._begin = now


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise KeyError(name)


def make_checkpoint(folder: Path, size: str) -> None:
    """Random weights whose head says [SEG] at about every second step."""
    config, params = SIZES[size], random_parameters(SIZES[size])
    with tempfile.TemporaryDirectory() as files:
        (Path(files) / "tokenizer.json").write_bytes(
            lzma.decompress((FILES / "tokenizer.json.xz").read_bytes())
        )
        shutil.copy(FILES / "tokenizer_config.json", files)
        params["language_model"]["lm_head"]["kernel"][:, Tokenizer.from_folder(files).seg_id] *= 100
        checkpoint.save(folder, config, params, files)


def made_study(slices: int) -> Study:
    """A bright ball in noise, drawn slice by slice: what that needs is not to be seen in the peaks."""
    random, side = np.random.default_rng(0), np.linspace(-1, 1, 512, dtype=np.float32)
    values = np.empty((slices, 512, 512), np.float32)
    for value, height in zip(values, np.linspace(-1, 1, slices), strict=True):
        inside = side**2 + side[:, None] ** 2 + height**2 < 0.3
        value[:] = random.standard_normal(value.shape, np.float32) * 30 + np.where(inside, 100, -100)
    origins = np.array([[0.0, 0.0, 5.0 * index] for index in range(slices)])
    geometry = Geometry(origins, np.array([0.8, 0, 0]), np.array([0, 0.8, 0]))
    return Study(values, "CT", "HU", geometry, "study-1", "series-1", body_part="ABDOMEN")


def ask(options: Options, folder: Path) -> None:
    """Load, ask, write."""
    peaks = Peaks()
    peaks.end("imports")
    model = UniBiomed.from_pretrained(folder, precision=find_precision(options.precision))
    peaks.end("loading")
    study = made_study(options.slices)
    peaks.end("reading the study")

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("following", 0):
            peaks.end("words")
        elif done == total:
            peaks.end(stage)

    answer = model.ask_study(
        study,
        QUESTION,
        conditioning=options.conditioning,
        max_new_tokens=options.max_new_tokens,
        max_masks=options.max_masks,
        batch_size=options.batch_size,
        progress=progress,
    )
    peaks.end("joining the masks")
    with tempfile.TemporaryDirectory() as out:
        write_study(study, answer, Path(out) / "bundle", ["nifti", "html"])
    peaks.end("writing")
    shown = [index + 1 for index in answer.conditioning.slices]
    print(f"Masks: {len(answer.segments)}; the language model saw slices {shown}.")


def main(options: Options) -> None:
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, {options.slices} slices")
    start = multiprocessing.get_context("spawn").Process  # what one has held is not counted for the other

    def run(function, *arguments) -> None:
        process = start(target=function, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.checkpoint or options.keep or Path(temporary) / "checkpoint"
        if not folder.exists():
            run(make_checkpoint, folder, options.size)
        run(ask, options, folder)


if __name__ == "__main__":
    main(tyro.cli(Options))
