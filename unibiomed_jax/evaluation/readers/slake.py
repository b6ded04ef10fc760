"""SLAKE: `{train,validation,test}.json` beside `imgs/xmlabN/source.jpg`, in English and Chinese."""

from __future__ import annotations

from pathlib import Path

from unibiomed_jax.evaluation.readers.questions import answer_type, field, question_sample, read_rows
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import shown

# Older copies call the validation split otherwise; both spellings are taken.
_VALIDATION = ("validation", "validate", "val")


def read_slake(data: Path, split: str) -> list[Sample]:
    """All questions of a split; those of each language are a dataset of their own, as tables of papers have.

    Raises:
        InputError: the table is missing or damaged.
    """
    names = _VALIDATION if split in _VALIDATION else (split,)
    paths = [data / f"{name}.json" for name in names]
    path = next((path for path in paths if path.is_file()), paths[0])
    found = []
    for number, row in enumerate(read_rows(path, "download SLAKE and unpack imgs.zip beside its tables"), 1):
        where = f"{shown(path)}, entry {number}"
        answer = field(row, "answer", where)
        found.append(
            question_sample(
                data,
                f"imgs/{field(row, 'img_name', where)}",
                field(row, "question", where),
                answer,
                doc_id=field(row, "qid", where),
                dataset=f"SLAKE {field(row, 'q_lang', where)}",
                modality=row.get("modality"),
                question_type=row.get("content_type"),
                answer_type=answer_type(row.get("answer_type"), answer),
                location=row.get("location"),
                knowledge=row.get("base_type"),
            )
        )
    return found
