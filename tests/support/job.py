"""Jobs of several processes on this machine, each with devices of its own, and what they leave behind."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from orbax.checkpoint.experimental import v1 as ocp
from places import MICRO_RUN, ROOT, TESTS
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax.stored_arrays import dtype_of
from unibiomed_jax.training.snapshot import leaves_by_name

# Seconds after which a process counts as one that hangs.
PATIENCE = 400


def write_data(folder: Path, sentence: str = "Liver in abdomen CT.") -> Path:
    """Twelve pictures with a square to train on, and two to validate."""
    for split, count in (("train", 12), ("val", 2)):
        for number in range(count):
            save_picture(folder / split / f"{number}.png", seed=number)
            save_square(folder / f"{split}_mask" / f"{number}_liver.png", corner=(number, number))
        write_table(folder / f"{split}.json", coco_table(count, sentence))
    return folder


def write_texts(folder: Path) -> Path:
    """Twelve pictures with a text: of such batches SAM2 sees nothing, and they are soon compiled."""
    for number in range(12):
        save_picture(folder / f"{number}.png", seed=number)
    rows = [{"file_name": f"{number}.png", "caption": f"Picture {number}."} for number in range(12)]
    for split in ("train", "val"):
        write_table(folder / f"{split}_captions.json", {"annotations": rows})
    return folder


def environment(base: Path) -> dict[str, str]:
    """Of all processes of the tests: their data, and the programs they compile."""
    return os.environ | {
        "MICRO_DATA": str(write_data(base / "data")),
        "PYTHONPATH": f"{ROOT}:{TESTS / 'support'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def train(folder: Path, *options: str) -> list[str]:
    return [str(ROOT / "train.py"), str(MICRO_RUN), f"--folder={folder}", *options]


class Job:
    """The processes of a job, started together; devices are made of the CPU."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: dict[str, str],
        *,
        processes: int,
        devices: int = 1,
        own: Sequence[Sequence[str]] = (),
        own_env: Sequence[dict[str, str]] = (),
        folders: Sequence[Path] = (),
    ):
        """`own` and `own_env`: what each process gets beside; `folders`: where each one is started."""
        self.files, self.running = [], []
        flags = (
            f"--xla_force_host_platform_device_count={devices}",
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        )
        port = free_port()
        for process in range(processes):
            command = [sys.executable, str(TESTS / "support" / "process.py"), *arguments]
            if processes > 1:
                place = f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={process}"
                command += place
            command += own[process] if own else ()
            mine = env | {"XLA_FLAGS": " ".join(flags)} | (own_env[process] if own_env else {})
            file = tempfile.TemporaryFile("w+", errors="replace")
            self.files.append(file)
            where = folders[process] if folders else None
            self.running.append(subprocess.Popen(command, env=mine, stdout=file, stderr=file, cwd=where))

    def wait(self) -> tuple[list[int], list[str]]:
        """(exit codes, what each process said with line breaks as spaces); none may hang."""
        try:
            codes = [process.wait(PATIENCE) for process in self.running]
        finally:
            self.end()
        said = []
        for file in self.files:
            file.seek(0)
            said.append(" ".join(file.read().split()))
        return codes, said

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        self.end()


def run(arguments: Sequence[str], env: dict[str, str], **settings) -> list[str]:
    """Run a job to its end, which must be a good one; what each process said."""
    codes, said = Job(arguments, env, **settings).wait()
    assert not any(codes), "\n".join(said)
    return said


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def checkpoints(folder: Path) -> list[str]:
    found = folder / "checkpoints"
    return sorted(path.name for path in found.iterdir()) if found.is_dir() else []


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / [name for name in checkpoints(folder) if name.isdigit()][-1]


def contents(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint by name, whatever devices it was saved from."""
    leaves = json.loads((checkpoint / "about.json").read_text())["leaves"]
    abstract: dict = {}
    for name, (shape, dtype) in leaves.items():
        *parents, last = name.split("/")
        node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, abstract)
        node[last] = np.broadcast_to(np.zeros((), dtype_of(dtype)), shape)  # which takes no memory
    return leaves_by_name(ocp.load(os.fspath(checkpoint / "state"), abstract))


def digests(leaves: dict[str, np.ndarray]) -> dict[str, str]:
    return {
        name: hashlib.sha256(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes()).hexdigest()
        for name, leaf in leaves.items()
    }


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
