"""The paper's protocol: what is compared for each task, from folders of the reference or from records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation import paper_masks, paper_text, reference_folders
from unibiomed_jax.evaluation.paper_masks import ImageItem, MaskItem, VolumePair
from unibiomed_jax.evaluation.paper_text import TextItem
from unibiomed_jax.evaluation.records import Sample, decode_masks
from unibiomed_jax.evaluation.repairs import Repairs
from unibiomed_jax.evaluation.tasks import TASKS
from unibiomed_jax.evaluation.text import TextScores

# How the numbers of records differ from those of the scripts' own folders.
DIFFERENCES = {
    "disease": "Images without an annotation are not asked; UniBiomed's scripts ask and count them.",
    "report": "UniBiomed's scripts compare reports with the captions of test.json, which --format reference "
    "reads; records of other formats have finding and report instead.",
}
# Tasks that the reference has no scripts for.
WITHOUT_SCRIPTS = ("vqa",)


@dataclass
class PaperInput:
    """What a task's scorers take."""

    masks: Iterable[MaskItem] = ()
    # Slices without a table, for the stand-alone script of volumes.
    volumes: Iterable[VolumePair] | None = None
    images: list[ImageItem] = field(default_factory=list)
    texts: list[TextItem] = field(default_factory=list)
    # What is not scored in words, and why.
    unscored: dict[str, str] = field(default_factory=dict)
    # What a reader of the numbers has to know.
    notes: list[str] = field(default_factory=list)

    def one_line(self, repairs: Repairs) -> PaperInput:
        """With every text as a single line, as the tokeniser needs it."""
        return replace(self, texts=paper_text.one_line(self.texts, repairs))


def from_folders(task: str, data: Path, predictions: Path, split: str, repairs: Repairs) -> PaperInput:
    """Predictions in the folders of the reference's scripts.

    Raises:
        InputError: the files cannot be used, or there is nothing to compare them with.
    """
    if task == "seg2d":
        return PaperInput(reference_folders.read_seg2d(data, predictions, split))
    if task == "seg3d":
        if (data / f"meta_{split}.json").exists() or not any(data.glob("*.png")):
            return PaperInput(reference_folders.read_seg3d(data, predictions, split))
        pairs, without_truth = reference_folders.read_volumes(data, predictions)
        return PaperInput(volumes=pairs, unscored=dict.fromkeys(without_truth, "no truth of that name"))
    if task == "region":
        return PaperInput(texts=reference_folders.read_regions(predictions))
    if task in ("disease", "gvqa", "report", "caption"):
        found = reference_folders.read_grounded(task, data, predictions, split, repairs)
        return PaperInput(images=found.images, texts=found.texts, unscored=found.unscored)
    raise InputError(f"The paper has no scripts for {task}; pass --protocol strict.")


def from_samples(task: str, samples: Sequence[Sample]) -> PaperInput:
    """Records as the reference's scripts would have written them, which clean the answers themselves."""
    if task in WITHOUT_SCRIPTS:
        raise InputError(f"The paper has no scripts for {task}; pass --protocol strict.")
    if task in ("seg2d", "seg3d"):
        # A mask without an answer is for the scorers, as the scripts have it; one without a truth is not.
        with_truth = [sample for sample in samples if sample.truth_masks or sample.reason is None]
        unscored = {sample.doc_id: sample.reason for sample in samples if sample.reason is not None}
        return PaperInput(map(_mask_item, with_truth), unscored=unscored)
    found = PaperInput(notes=[DIFFERENCES[task]] if task in DIFFERENCES else [])
    if task == "disease":
        samples = _once_an_image(samples, found)
    for sample in samples:
        if TASKS[task].masks:
            truths, masks = (
                decode_masks(masks, sample.doc_id) for masks in (sample.truth_masks, sample.masks)
            )
            found.images.append(ImageItem(sample.doc_id, truths, masks))
        said, _ = _kept(sample)
        if said is None or sample.answer is None:
            found.unscored[sample.doc_id] = sample.reason or "nothing to say about it, or no answer"
            continue
        truth = sample.answer
        if task == "region":
            truth = paper_text.shorten(truth.lower())
        elif task in ("disease", "gvqa"):
            truth += "."
        found.texts.append(TextItem(sample.doc_id, truth, said))
    return found


def _once_an_image(samples: Sequence[Sample], found: PaperInput) -> list[Sample]:
    """One record of every image, with the truths of all; the others are noted as unscored.

    The scripts ask once about an image, and judge the words where it has one annotation.
    """
    by_image: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        by_image.setdefault((sample.dataset, sample.image), []).append(sample)
    once = []
    for first, *others in by_image.values():
        if others:
            truths = tuple(mask for sample in (first, *others) for mask in sample.truth_masks)
            first = replace(first, truth_masks=truths, answer=None)
            reason = f"one of {len(others) + 1} annotations of its image, which is asked about once"
            found.unscored |= {sample.doc_id: reason for sample in others}
        once.append(first)
    return once


def _kept(sample: Sample) -> tuple[str | None, list[str]]:
    """Words and phrases of an answer, as the reference's scripts keep them."""
    if sample.response is None:
        return sample.prediction, []
    return TASKS[sample.task].clean(sample.response)


def to_folders(task: str, samples: Sequence[Sample], folder: Path, split: str) -> None:
    """Write predictions as the reference's scripts do, for its scorers. What was not answered has no file.

    Records of seg2d are named (doc_id) as their mask files, those of seg3d name their slices.

    Raises:
        InputError: the reference has no such task, or a volume does not name its slices.
    """
    if task in WITHOUT_SCRIPTS:
        raise InputError(f"The paper has no scripts for {task}; leave out --folders.")
    answered = [sample for sample in samples if sample.reason is None]
    if task == "region":
        items = from_samples(task, answered).texts
        accuracy = paper_text.region_accuracy(items, Repairs(allowed=True))
        reference_folders.write_regions(folder, items, accuracy)
        return
    for sample in answered:
        masks = decode_masks(sample.masks, sample.doc_id)
        if task == "seg2d":
            for mask in masks[:1]:
                reference_folders.write_mask(folder / split / sample.doc_id, mask)
        elif task == "seg3d":
            for mask in masks[:1]:
                if len(mask) != len(sample.slices):
                    raise InputError(
                        f"{sample.doc_id} names {len(sample.slices)} of {len(mask)} slices; name all."
                    )
                for name, piece in zip(sample.slices, mask, strict=True):
                    reference_folders.write_mask(folder / sample.image / sample.category / name, piece)
        else:
            caption, phrases = _kept(sample)
            reference_folders.write_answer(
                folder, sample.image, caption or "", phrases, masks if TASKS[task].masks else None
            )


def _mask_item(sample: Sample) -> MaskItem:
    if not sample.truth_masks:
        raise InputError(f"{sample.doc_id} has no truth mask; add one, empty if the target is not there.")
    (truth,) = decode_masks(sample.truth_masks[:1], sample.doc_id)
    predicted = decode_masks(sample.masks[:1], sample.doc_id)[0] if sample.masks else None
    truth = truth.astype(np.uint8)
    if truth.ndim == 2:
        return MaskItem(sample.doc_id, sample.category, truth, predicted)
    listed = [number for number, piece in enumerate(truth) if piece.any()] or [0]
    return MaskItem(
        sample.image or sample.doc_id,
        sample.category,
        [truth[number] for number in listed],
        [None if predicted is None else predicted[number] for number in listed],
    )


def score(task: str, given: PaperInput, texts: TextScores | None, repairs: Repairs) -> dict[str, Any]:
    """The numbers of a task: `metrics`, those of every item where the reference has them, and their counts.

    Args:
        task: its name.
        given: what is compared.
        texts: the n-gram scores of `given.texts`, for the tasks that have them.
        repairs: of what the reference fails at.
    """
    if given.volumes is not None:
        found = paper_masks.volumes(given.volumes, repairs)
        count = sum(len(of_target) for of_target in found["volumes"].values())
        return {"metrics": found["mean"], "classes": found["targets"], "items": found["volumes"], "n": count}
    if task in ("seg2d", "seg3d"):
        scorer = paper_masks.seg2d if task == "seg2d" else paper_masks.seg3d
        found = scorer(given.masks, repairs)
        means = found.pop("mean")
        metrics = {name: value for name, value in means.items() if not isinstance(value, dict)}
        classes = {name: value for name, value in means.items() if isinstance(value, dict)}
        count = sum(bool(scores) for scores in found.values())
        if task == "seg3d":
            count = sum(len(of_volume) for of_volume in found.values())
        return {"metrics": metrics, "classes": classes, "items": found, "n": count}
    metrics: dict[str, float | None] = {}
    if task == "region":
        metrics["accuracy"] = paper_text.region_accuracy(given.texts, repairs)
    elif task == "disease":
        metrics["accuracy"] = paper_text.disease_accuracy(given.texts)
    elif task == "gvqa":
        metrics["accuracy"] = paper_text.gvqa_accuracy(given.texts)
    if texts is not None:
        metrics |= texts.whole
    elif TASKS[task].ngrams:
        repairs.repair(
            f"No text of {task} can be scored", reference="stops with ValueError", instead="give no numbers"
        )
    result: dict[str, Any] = {"metrics": metrics, "n": len(given.texts)}
    if TASKS[task].masks:
        metrics["mdice"], result["items"] = paper_masks.mean_dice(given.images, repairs)
        result["images"] = len(given.images)
    return result
