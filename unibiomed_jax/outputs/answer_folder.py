"""Answers on disk: a folder per image with answer.json, one PNG per mask and an overlay to look at."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import in_bucket, new_folder, shown
from unibiomed_jax.inference.answer import Answer, OpenedImage, Segment
from unibiomed_jax.inference.phrases import clean_answer
from unibiomed_jax.masks import run_length
from unibiomed_jax.masks.overlay import overlay

ANSWER_FILE = "answer.json"


def record(
    answer: Answer, *, checkpoint_hash: str, precision: Precision, request: Mapping | None = None
) -> dict:
    """The answer as JSON-ready values; masks of a volume are lists, one entry per frame.

    `request` is whatever else was asked for: regions, chosen slices, limits.
    """
    return {
        "notice": answer.notice,
        "prompt": answer.prompt,
        "request": dict(request or {}),
        "text": answer.text,
        "readable_text": clean_answer(answer.text),
        "segments": [
            {
                "phrase": segment.phrase,
                "predicted_iou": segment.iou,
                "object_score": segment.object_score,
                "pixels": int(segment.mask.sum()),
                "mask": run_length.encode(segment.mask),
            }
            for segment in answer.segments
        ],
        # Names alone: the folders above may be named after patients.
        "preprocessing": [vars(read) | {"source": Path(shown(read.source)).name} for read in answer.records],
        "checkpoint": checkpoint_hash,
        "precision": to_dict(precision),
        "versions": {name: version(name) for name in ("unibiomed-jax", "jax", "flax", "numpy", "pillow")},
        "device": jax.devices()[0].device_kind,
        "seconds": {stage: round(value, 4) for stage, value in answer.seconds.items()},
    }


def write(folder: Path, image: OpenedImage, answer: Answer, answer_record: dict) -> None:
    """Write an answer; it is complete, or what was there stays.

    Raises:
        DiskFullError: no space is left.
        InputError: the folder may not be written, or holds something else than an answer.
    """
    if folder.exists() and not exists(folder) and not _is_unfinished(folder):
        raise InputError(f"{shown(folder)} holds something else than an answer; choose another --out.")
    try:
        with new_folder(folder, overwrite=True) as partial:
            for number, segment in enumerate(answer.segments):
                _write_masks(partial, f"mask_{number}_{_slug(segment.phrase)}", segment)
            _write_overlays(partial, image, answer)
            text = json.dumps(answer_record, indent=2, ensure_ascii=False)
            (partial / ANSWER_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{shown(folder)} could not be written ({error.strerror}); choose another --out."
        ) from error


def exists(folder: Path) -> bool:
    """Whether `folder` holds an answer, to whatever question."""
    return (folder / ANSWER_FILE).is_file()


def is_done(folder: Path, *, prompt: str, checkpoint_hash: str, request: Mapping) -> bool:
    """Whether `folder` holds the answer of this checkpoint to this prompt and request (see `record`)."""
    try:
        found = json.loads((folder / ANSWER_FILE).read_text(encoding="utf-8"))
        asked = found["prompt"], found["checkpoint"], found["request"]
        return asked == (prompt, checkpoint_hash, dict(request))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_unfinished(folder: Path) -> bool:
    """Whether `folder` holds what was killed while it was written: in a bucket that stays where it is."""
    return in_bucket(folder) and all(path.name.startswith(("mask_", "overlay")) for path in folder.iterdir())


def _write_masks(folder: Path, name: str, segment: Segment) -> None:
    if segment.mask.ndim == 2:
        _save(Image.fromarray(segment.mask.astype(np.uint8) * 255), folder / f"{name}.png")
        return
    (folder / name).mkdir()
    for index, frame in enumerate(segment.mask):
        _save(Image.fromarray(frame.astype(np.uint8) * 255), folder / name / f"{index:04d}.png")


def _write_overlays(folder: Path, image: OpenedImage, answer: Answer) -> None:
    labels = [segment.phrase for segment in answer.segments]
    if not image.is_volume:
        masks = [segment.mask for segment in answer.segments]
        _save(overlay(image.frames[0], masks, labels), folder / "overlay.png")
        return
    (folder / "overlay").mkdir()
    for index, frame in enumerate(image.frames):
        masks = [segment.mask[index] for segment in answer.segments]
        _save(overlay(frame, masks, labels), folder / "overlay" / f"{index:04d}.png")


def _save(image: Image.Image, path: Path) -> None:
    written = io.BytesIO()
    image.save(written, "PNG")
    path.write_bytes(written.getvalue())


def _slug(phrase: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", phrase.lower()).strip("_")[:40] or "region"
