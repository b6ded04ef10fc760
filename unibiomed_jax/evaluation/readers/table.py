"""A table of one's own: questions and answers about images, as CSV, JSON Lines or a JSON list."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.readers.questions import answer_type, field, question_sample, read_rows
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import read_text, shown

REMEDY = "write a row with image, question and answer for each question"


def read_table(data: Path, split: str) -> list[Sample]:
    """All rows of the file, or those whose `split` is the one asked for, where it has such a column.

    Columns: image (a path from the table's folder), question, answer; if they are there also id, patient,
    dataset, modality, question_type, answer_type (open or closed) and split.

    Raises:
        InputError: the file is a folder, no such table, or lacks a field.
    """
    if data.is_dir():
        raise InputError(f"{shown(data)} is a folder; name the table itself with --data.")
    found = []
    for number, row in enumerate(_rows(data), 1):
        where = f"{shown(data)}, row {number}"
        if row.get("split") not in (None, "", split):
            continue
        answer = field(row, "answer", where)
        patient = row.get("patient")
        found.append(
            question_sample(
                data.parent,
                field(row, "image", where),
                field(row, "question", where),
                answer,
                doc_id=str(number if row.get("id") in (None, "") else row["id"]),
                dataset=str(row.get("dataset") or data.stem),
                patient=None if patient in (None, "") else str(patient),
                modality=row.get("modality"),
                question_type=row.get("question_type"),
                answer_type=answer_type(row.get("answer_type"), answer),
            )
        )
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind == ".json":
        return read_rows(path, REMEDY)
    if kind == ".csv":
        text = read_text(path, remedy=REMEDY, encoding="utf-8-sig")
        try:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:  # such as a cell of more than 131,072 characters
            raise InputError(f"{shown(path)} is no table that can be read ({error}); {REMEDY}.") from None
    if kind != ".jsonl":
        raise InputError(f"{shown(path)} is no table; give a .csv, .jsonl or .json file.")
    rows = []
    text = read_text(path, remedy=REMEDY, encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other separators
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise InputError(f"{shown(path)}, line {number} is no JSON object; {REMEDY}.")
            rows.append(row)
    return rows
