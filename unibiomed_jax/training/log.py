"""What a run writes about itself: JSON lines, TensorBoard, pictures."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from unibiomed_jax import distributed
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import write_beside
from unibiomed_jax.masks.overlay import overlay


class RunLog:
    """`log.jsonl`, one line per report: {"step", "kind", "seconds" since 1970, the measures ...}.

    JSON has no word for a number that is not finite: it is written as null. Of the processes of a job the
    first one writes.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool, first_step: int = 0):
        """Open the log of a run; what it says of updates after `first_step` (that a resume repeats) goes.

        Raises:
            InputError: TensorBoard files are wanted but their writer is not installed.
        """
        self.folder = Path(folder)
        self._writes = distributed.is_first()
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "log.jsonl"
        if self.path.exists():
            _keep_until(self.path, first_step)
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
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Report measures of an update; `kind` is train, validation, ..."""
        if not self._writes:
            return
        line = {"step": step, "kind": kind, "seconds": time.time()}
        line |= {name: _finite_or_none(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
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
        picture.convert("RGB").save(path, quality=85)
        if self._board is not None:
            self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()


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


def _keep_until(path: Path, step: int) -> None:
    """Drop the reports of later updates, and a line that a kill cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    write_beside(path, "".join(kept).encode())
