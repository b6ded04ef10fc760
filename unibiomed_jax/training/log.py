"""What a run writes about itself: JSON lines, TensorBoard, pictures, a trace of its computations."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from unibiomed_jax import distributed
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import copy_folder, in_bucket, locate, write_beside
from unibiomed_jax.masks.overlay import overlay

# A file in a bucket cannot be appended to: it is written anew, no more often than so many seconds apart.
REWRITE = 30


class RunLog:
    """`log.jsonl`, one line per report: {"step", "kind", "seconds" since 1970, the measures ...}.

    JSON has no word for a number that is not finite: it is written as null. Of the processes of a job the
    first one writes. As a context manager it is closed however the block ends.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool, first_step: int = 0):
        """Open the log of a run; what it says of updates after `first_step` (that a resume repeats) goes.

        Raises:
            InputError: TensorBoard files are wanted but their writer is not installed.
        """
        self.folder = locate(folder)
        self._writes = distributed.is_first()
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "log.jsonl"
        kept = _keep_until(self.path, first_step) if self.path.exists() else b""
        if in_bucket(self.folder):
            # What TensorBoard and the profiler write, until it is complete enough to be copied.
            self._scratch = tempfile.TemporaryDirectory(prefix="unibiomed-")  # goes with this object
            self._local = Path(self._scratch.name)
            self._lines, self._rewritten = bytearray(kept), time.monotonic()
        else:
            self._local = self.folder
            self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise InputError(
                    "TensorBoard files need the package tensorboardX: install unibiomed-jax[tensorboard], or "
                    "pass --log.no-tensorboard."
                ) from None
            self._board = SummaryWriter(str(self._local / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, BucketError):  # a bucket that is gone gets nothing more
            self.close()

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Report measures of an update; `kind` is train, validation, ..."""
        if not self._writes:
            return
        line = {"step": step, "kind": kind, "seconds": time.time()}
        line |= {name: _finite_or_none(value) for name, value in values.items()}
        text = json.dumps(line, allow_nan=False) + "\n"
        if in_bucket(self.folder):
            self._lines += text.encode()
            if time.monotonic() - self._rewritten > REWRITE:
                self.flush()
        else:
            self._file.write(text)
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Keep a picture in `pictures/`."""
        if not self._writes:
            return
        path = self.folder / "pictures" / f"{step:08d}-{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        written = io.BytesIO()
        picture.convert("RGB").save(written, "JPEG", quality=85)
        path.write_bytes(written.getvalue())
        if self._board is not None:
            self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def start_trace(self) -> None:
        """Record what the devices do from now on in `profile/`."""
        if self._writes:
            jax.profiler.start_trace(str(self._local / "profile"))

    def stop_trace(self) -> None:
        if not self._writes:
            return
        jax.profiler.stop_trace()
        if in_bucket(self.folder):
            copy_folder(self._local / "profile", self.folder / "profile")

    def flush(self) -> None:
        """Write into a bucket what was reported until now; on a disk it is there already."""
        if not self._writes or not in_bucket(self.folder):
            return
        write_beside(self.path, bytes(self._lines))
        self._rewritten = time.monotonic()
        if self._board is not None:
            self._board.flush()
            copy_folder(self._local / "tensorboard", self.folder / "tensorboard")

    def close(self) -> None:
        if not self._writes:
            return
        if self._board is not None:
            self._board.close()
        if in_bucket(self.folder):
            self.flush()
        else:
            self._file.close()


def mask_picture(pixels: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Image.Image:
    """An image with the true and the predicted outline of one object.

    Args:
        pixels: (side, side, 3) bytes.
        truth, predicted: (M, M) masks, shown at the image's size.
    """
    side = pixels.shape[0]

    def enlarged(mask: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.asarray(mask, np.uint8) * 255)
        return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR)) > 127

    return overlay(Image.fromarray(pixels), [enlarged(truth), enlarged(predicted)], ["truth", "predicted"])


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_until(path: Path, step: int) -> bytes:
    """Drop the reports of later updates, and a line that a kill cut short; gives what stays."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    content = "".join(kept).encode()
    write_beside(path, content)
    return content
