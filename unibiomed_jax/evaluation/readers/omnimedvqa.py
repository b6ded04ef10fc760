"""OmniMedVQA: lists of multiple choice questions in `QA_information/{Open,Restricted}-access/*.json`, images
in `Images/`.

The fields are those that other codes read: question, image_path, gt_answer, which is the text of an option,
and option_A to option_D, of which some are missing (utils/OmniMedVQA/OmniMedVQA.py of MedEvalKit, 9b12e3b);
question_type, and modality_type, for which one entry of `Chest CT Scan.json` has `modality`
(part1_dataexploration.md of GiovanniCornejo/MediVision-OmniMedVQA). dataset and question_id may be missing.
"""

from __future__ import annotations

from pathlib import Path

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.readers.questions import LETTERS, field, question_sample, read_rows
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import shown

# All of it is for testing. Images of the restricted part have to be fetched from their sources.
_FOLDERS = {"test": "Open-access", "restricted": "Restricted-access"}


def read_omnimedvqa(data: Path, split: str) -> list[Sample]:
    """All questions of a split: "test" is what comes with its images, "restricted" the rest.

    Raises:
        InputError: no such split, no tables, or a damaged one.
    """
    if split not in _FOLDERS:
        raise InputError(
            f"OmniMedVQA has no split {split!r}; pass --split test (open access) or --split restricted."
        )
    folder = data / "QA_information" / _FOLDERS[split]
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(
            f"{shown(folder)} holds no tables; unpack OmniMedVQA.zip, and name its folder with --data."
        )
    found = []
    for path in paths:
        for number, row in enumerate(read_rows(path, "unpack OmniMedVQA.zip again"), 1):
            where = f"{shown(path)}, entry {number}"
            choices = [
                field(row, f"option_{letter}", where) for letter in LETTERS if row.get(f"option_{letter}")
            ]
            answer = field(row, "gt_answer", where)
            if answer not in choices:
                raise InputError(f"{where} has an answer that is none of its options; correct one of them.")
            found.append(
                question_sample(
                    data,
                    field(row, "image_path", where),
                    field(row, "question", where),
                    answer,
                    doc_id=f"{path.stem}/{row.get('question_id', number)}",
                    dataset="OmniMedVQA",
                    choices=choices,
                    modality=row.get("modality_type", row.get("modality")),
                    question_type=row.get("question_type"),
                    source=row.get("dataset", path.stem),
                )
            )
    return found
