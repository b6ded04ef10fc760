"""One record of an evaluation: a question, what is true, what was answered, and how that was scored.

A run's folder holds a `samples_TASK.jsonl` per task, a line per record, with the field names of lmms-eval
(doc_id, doc_hash, input, target, resps, filtered_resps) and those of VLMEvalKit (index, question, answer,
prediction, category), so that either reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import shown, write_beside
from unibiomed_jax.masks import run_length

# Run-length encodings, as they stand in JSON: ten thousand masks as arrays would not fit into memory.
EncodedMasks = tuple[dict | list[dict], ...]


@dataclass(frozen=True)
class Sample:
    """A record. Its masks are of an image, or of all slices of a volume."""

    task: str
    # Unique among the records of the task.
    doc_id: str
    question: str
    # What should be said; None where words are not judged.
    answer: str | None = None
    # The words of the model as they came; None if it was not asked, or failed.
    response: str | None = None
    # What is judged of them: without marks.
    prediction: str | None = None
    # The target, by which scores are grouped.
    category: str = ""
    dataset: str = ""
    # What else it can be grouped by: modality, question_type, answer_type ("open" or "closed"), ...
    groups: dict[str, str] = field(default_factory=dict)
    # Of a multiple choice question, what can be chosen: A, B, ...
    choices: tuple[str, ...] = ()
    # Who was imaged; None where nobody says, and then every image is a patient.
    patient: str | None = None
    image: str = ""
    # File names of a volume's slices.
    slices: tuple[str, ...] = ()
    # Of a pixel (y, x) or voxel (z, y, x), mm; None where nobody says.
    spacing: tuple[float, ...] | None = None
    # Of a region, what the question is about.
    truth_masks: EncodedMasks = ()
    masks: EncodedMasks = ()
    # Of each mask, the model's own logit that there is such a thing; of a volume the largest of its slices.
    object_scores: tuple[float, ...] = ()
    # By protocol, scores by name.
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    # Why it was not answered, or cannot be scored.
    reason: str | None = None

    @property
    def doc_hash(self) -> str:
        """Tells apart records of one doc_id: of what is asked and what is true."""
        asked = [self.task, self.doc_id, self.question, self.answer, self.category, self.dataset, self.image]
        text = json.dumps([*asked, self.truth_masks], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.doc_id, self.doc_hash

    @property
    def group(self) -> str:
        """Whom the bootstrap draws: the patient, or else the image."""
        return f"patient {self.patient}" if self.patient is not None else f"image {self.image or self.doc_id}"


def encode_masks(masks: Iterable[np.ndarray]) -> EncodedMasks:
    """Masks as a record holds them, from (height, width) or (slices, height, width)."""
    return tuple(run_length.encode(mask) for mask in masks)


def decode_masks(masks: EncodedMasks, where: str) -> list[Bool[np.ndarray, "*slices height width"]]:
    """The masks of a record.

    Raises:
        InputError: `where` they stand is one that is damaged.
    """
    return [run_length.decode(mask, where) for mask in masks]


def samples_file(run: Path, task: str) -> Path:
    return run / f"samples_{task}.jsonl"


def to_json(sample: Sample, index: int) -> dict[str, Any]:
    """A record as a line of the file; `index` is its number in it."""
    own = {name: value for name, value in vars(sample).items() if name != "response"}
    responses = [] if sample.response is None else [sample.response]
    return own | {
        "index": index,
        "doc_hash": sample.doc_hash,
        "input": sample.question,
        "target": sample.answer,
        "resps": [responses],
        "filtered_resps": [] if sample.prediction is None else [sample.prediction],
    }


_TEXTS = ("task", "doc_id", "question", "category", "dataset", "image")
_TEXTS_OR_NULL = ("answer", "prediction", "patient", "reason", "response")


def from_json(line: Any, where: str) -> Sample:
    """The record of a line; fields of other programs beside ours are passed over.

    Raises:
        InputError: a field is missing or of another type.
    """
    if not isinstance(line, dict):
        raise InputError(f"{where} is no record; write it again.")
    values = {name: line[name] for name in Sample.__dataclass_fields__ if name in line}
    for name in _TEXTS:
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{where} has a {name} that is no text; correct it.")
    if missing := [name for name in ("task", "doc_id", "question") if name not in values]:
        raise InputError(f"{where} has no {missing[0]}; correct it.")
    for name in ("truth_masks", "masks"):
        values[name] = tuple(line.get(name) or ())
        decode_masks(values[name], where)  # to say it now, and where, if one is damaged
    if "prediction" not in values and line.get("filtered_resps"):  # as lmms-eval names it
        values["prediction"] = line["filtered_resps"][0]
    spacing = values.get("spacing")
    try:
        values["slices"] = tuple(map(str, values.get("slices", ())))
        values["choices"] = tuple(map(str, values.get("choices", ())))
        values["groups"] = {name: str(group) for name, group in values.get("groups", {}).items()}
        values["spacing"] = None if spacing is None else tuple(float(size) for size in spacing)
        values["object_scores"] = tuple(float(score) for score in values.get("object_scores", ()))
        values["response"] = line["resps"][0][0] if line.get("resps", [[]])[0] else None
        values["scores"] = {
            protocol: {name: float(value) for name, value in scores.items()}
            for protocol, scores in values.get("scores", {}).items()
        }
    except (TypeError, ValueError, LookupError, AttributeError):
        raise InputError(
            f"{where} has slices, choices, groups, a spacing, resps or scores of another form; correct it."
        ) from None
    for name in _TEXTS_OR_NULL:
        if not isinstance(values.get(name), str | None):
            raise InputError(f"{where} has a {name} that is no text; put it in quotation marks.")
    if values["spacing"] is not None and not all(0 < size < float("inf") for size in values["spacing"]):
        raise InputError(f"{where} has the spacing {spacing}; give millimetres above 0, or null.")
    return Sample(**values)


def read_samples(path: Path, task: str) -> list[Sample]:
    """The records of a file. Of a record that was asked again, the last answer counts; a last line that was
    cut off by a kill is passed over: its record will be asked again.

    Raises:
        InputError: the file is missing or empty, a line in it is damaged, or two records share a doc_id.
    """
    found: dict[str, Sample] = {}
    for number, line in _lines(path):
        where = f"{shown(path)}, line {number}"
        sample = from_json(line, where)
        if sample.task != task:
            raise InputError(f"{where} is of the task {sample.task!r}, not {task!r}; correct one of them.")
        before = found.get(sample.doc_id)
        if before is not None and before.doc_hash != sample.doc_hash:
            raise InputError(f"{where} repeats the doc_id {sample.doc_id!r} of another record; rename one.")
        found[sample.doc_id] = sample
    if not found:
        raise InputError(f"{shown(path)} holds no record of the task {task!r}; answer it first.")
    return list(found.values())


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: a text may hold other separators
    except FileNotFoundError:
        raise InputError(f"{shown(path)} is missing; answer the task first, or correct --task.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            if number == len(lines) and error.reason == "unexpected end of data":  # cut off within a letter
                return
            raise InputError(f"{shown(path)} is damaged ({error}); answer the task again.") from None
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline behind it: writing was cut off
                return
            raise InputError(f"{shown(path)}, line {number} is no JSON; remove it.") from None


class SampleWriter:
    """Appends records to the file of a task, each on the disk when it is written."""

    def __init__(self, path: Path):
        """Open `path` for more records; what a kill left of a last line is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        self._count = content[:whole].count(b"\n")

    def write(self, sample: Sample) -> None:
        line = json.dumps(to_json(sample, self._count), ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        self._count += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Replace a file of records as a whole, as with new scores in them."""
    lines = [
        json.dumps(to_json(sample, index), ensure_ascii=False, allow_nan=False)
        for index, sample in enumerate(samples)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def with_scores(sample: Sample, protocol: str, scores: dict[str, float]) -> Sample:
    """The record with its scores under one protocol."""
    return replace(sample, scores=sample.scores | {protocol: scores})
