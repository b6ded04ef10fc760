"""What the datasets of questions and answers share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import read_json, shown
from unibiomed_jax.inputs.prompt import IMAGE

CLOSED, OPEN = "closed", "open"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_rows(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects of a JSON list.

    Raises:
        InputError: the file is missing, or no such list.
    """
    rows = read_json(path, remedy=remedy)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{shown(path)} is no list of questions; {remedy}.")
    return rows


def field(row: dict[str, Any], name: str, where: str) -> str:
    """A field as text; answers such as 2 are numbers in some files.

    Raises:
        InputError: it is missing, or neither text nor a number.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{where} has no {name}; correct the file, or download it again.")
    return str(value).strip()


def groups(**named: Any) -> dict[str, str]:
    """What a record can be grouped by, without what its file does not say."""
    return {
        name: str(value).strip() for name, value in named.items() if value is not None and str(value).strip()
    }


def answer_type(said: Any, answer: str) -> str:
    """Whether a question is closed: what its file says, or else whether the answer is yes or no."""
    if isinstance(said, str) and said.strip():
        return CLOSED if said.strip().lower() in (CLOSED, "yes/no") else OPEN
    return CLOSED if answer.strip().lower().rstrip(".") in ("yes", "no") else OPEN


def question_sample(
    data: Path,
    image: str,
    question: str,
    answer: str,
    *,
    doc_id: str,
    dataset: str,
    patient: str | None = None,
    choices: Sequence[str] = (),
    **grouped: Any,
) -> Sample:
    """A question about an image.

    Args:
        data: the folder that the image's name starts from.
        image: its name; a record whose image is missing comes with that reason.
        question: as it stands in the dataset.
        answer: the true one.
        doc_id: unique within the task.
        dataset: its name in tables.
        patient: who was imaged, if the dataset says.
        choices: what can be chosen, written below the question.
        grouped: see `Sample.groups`.
    """
    if choices:
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        question = f"{question}\n{options}\nAnswer with one of these options."
    return Sample(
        "vqa",
        doc_id,
        f"{IMAGE}\n{question}",
        answer=answer,
        dataset=dataset,
        patient=patient,
        image=image,
        choices=tuple(choices),
        groups=groups(**grouped),
        reason=None if is_file(data / image) else f"the image {shown(image)} is missing; copy it there",
    )


@functools.lru_cache(maxsize=200_000)
def is_file(path: Path) -> bool:
    """Whether there is a file; images of many questions are looked for once."""
    return path.is_file()
