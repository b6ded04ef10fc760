"""Dice and right answers of a model on one split of a dataset, target by target.

Every record is asked once, as a user would ask, with one of its task's questions (the same one in every run):

- segmentation: Dice of the mask at the image's own size; an answer without a mask counts as 0;
- sequences: Dice of all slices of the volume together, prompted in slices that show the target;
- disease, region, grounded questions, reports: the share of answers that are right to the last letter.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from unibiomed_jax.data.files import image_size
from unibiomed_jax.data.mixture import find_datasets, read_mixture
from unibiomed_jax.data.prompts import Conversation, PromptConfig, draw, variants
from unibiomed_jax.data.records import Kind, Record
from unibiomed_jax.data.transforms import draw_box, load_mask
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.answer import Answer, Request
from unibiomed_jax.inference.predictor import UniBiomed
from unibiomed_jax.inputs.images import open_image
from unibiomed_jax.inputs.prompt import STOP_TEXT
from unibiomed_jax.masks.measures import dice_score

PROMPTS = PromptConfig(turn="inference", phrase_marks="special")
ANSWERED = (Kind.DISEASE, Kind.REGION, Kind.VQA, Kind.REPORT)


@dataclass(frozen=True)
class Result:
    """What came out for one record."""

    record: Record
    # Dice, or 1 and 0 for a right and a wrong answer.
    score: float
    text: str


def read_records(folder: Path, split: str, names: Sequence[str]) -> list[Record]:
    """All records but captions of the datasets of these names, or of all.

    Raises:
        InputError: no dataset has one of the names, or none of them has this split.
    """
    found = find_datasets(folder, split, balance_to=0, repeats=1)
    unknown = set(names) - {path.name for path in folder.rglob("*") if path.is_dir()}
    if unknown:
        raise InputError(f"{folder} holds no dataset {', '.join(sorted(unknown))}; correct --datasets.")
    asked = [data for data in found if data.kind is not Kind.CAPTION]
    wanted = [data for data in asked if not names or Path(data.root).name in names]
    if not wanted:
        raise InputError(
            f"There is nothing to ask in the split {split!r} of {', '.join(names) or folder}; correct "
            "--split or --datasets."
        )
    return list(read_mixture(wanted).records)


def conversation(record: Record) -> Conversation:
    """Question and answer of a record, drawn from its name alone."""
    seed = int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:4], "big")
    return draw(record, np.random.default_rng(seed), 0, PROMPTS)


def truth(record: Record) -> np.ndarray:
    """The mask of a record's first object, (height, width), or (slices, height, width) of a volume."""
    size = image_size(record)
    masks = [load_mask(path, size, record.name) for path in record.masks[0]]
    return np.stack(masks) if record.kind is Kind.SEQUENCE else masks[0]


def request(model: UniBiomed, record: Record) -> Request:
    """The record as a user would ask it; a region is shown by a box drawn into the image."""
    question = conversation(record).question
    if record.kind is Kind.SEQUENCE:
        shown = np.flatnonzero(truth(record).any((1, 2)))
        limit = min(model.config.sam2.max_conditioning_frames, len(shown))
        chosen = shown[np.linspace(0, len(shown) - 1, limit + 2).round().astype(int)[1:-1]]
        return Request(question, model.open_volume(record.images, conditioning=sorted(set(chosen.tolist()))))
    if record.kind is Kind.REGION:
        pixels = np.asarray(open_image(record.images[0])[0])
        return Request(question, Image.fromarray(draw_box(pixels, truth(record), np.random.default_rng(0))))
    return Request(question, record.images[0])


def dice(answer: Answer, mask: np.ndarray) -> float:
    """Dice of the first mask, all slices of a volume together; 0 without an answer."""
    if not answer.segments:
        return 0.0
    width = mask.shape[-1]
    return float(dice_score(answer.segments[0].mask.reshape(-1, width), mask.reshape(-1, width)))


def right(answer: Answer, record: Record) -> float:
    """1 if the text is one of those that the record's task accepts."""
    said = answer.text.removesuffix(STOP_TEXT).strip()
    return float(said in variants(record, PROMPTS)[1])


def ask(model: UniBiomed, records: Sequence[Record], size: int) -> Iterator[Result]:
    """Ask every record, several at a time; volumes one by one."""
    volumes = [(record,) for record in records if record.kind is Kind.SEQUENCE]
    images = [record for record in records if record.kind is not Kind.SEQUENCE]
    groups = [*(images[i : i + size] for i in range(0, len(images), size)), *volumes]
    for group in track(groups, "asking"):
        answers = model.predict_batch([request(model, record) for record in group], max_new_tokens=96)
        for record, answer in zip(group, answers, strict=True):
            score = right(answer, record) if record.kind in ANSWERED else dice(answer, truth(record))
            yield Result(record, score, answer.text)


def tables(results: Sequence[Result]) -> dict[str, list[tuple[str, float, int, int]]]:
    """By task: (target, mean score, cases, patients), and the mean over all targets."""
    found: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        kind = result.record.kind
        target = result.record.texts[0] if kind in (Kind.SEGMENTATION, Kind.SEQUENCE) else "all"
        found[str(kind)][target.lower()].append(result)
    rows: dict[str, list[tuple[str, float, int, int]]] = {}
    for kind, targets in found.items():
        rows[kind] = [
            (
                target,
                float(np.mean([result.score for result in of_target])),
                len(of_target),
                len({result.record.patient or result.record.name for result in of_target}),
            )
            for target, of_target in sorted(targets.items())
        ]
        if len(rows[kind]) > 1:
            mean = float(np.mean([row[1] for row in rows[kind]]))
            rows[kind].append(("mean of the targets", mean, sum(row[2] for row in rows[kind]), 0))
    return rows


def markdown(rows: dict[str, list[tuple[str, float, int, int]]]) -> str:
    """The tables for a page."""
    parts = []
    for kind, lines in rows.items():
        measure = "right" if kind in ANSWERED else "Dice"
        parts.append(f"| {kind} | {measure} | cases | patients |\n|---|---|---|---|")
        parts[-1] += "".join(f"\n| {name} | {score:.2f} | {n} | {p or ''} |" for name, score, n, p in lines)
    return "\n\n".join(parts) + "\n"
