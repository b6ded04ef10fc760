"""VQA-RAD with its types: `trainset.json` and `testset.json` beside a folder of images.

The copy in parquet has no types; `parquet.py` reads it.
"""

from __future__ import annotations

from pathlib import Path

from unibiomed_jax.evaluation.readers.questions import answer_type, field, question_sample, read_rows
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import shown

# Where copies keep the images.
_FOLDERS = ("images", "VQA_RAD Image Folder")


def read_vqa_rad(data: Path, split: str) -> list[Sample]:
    """All questions of a split, train or test.

    Raises:
        InputError: the table is missing or damaged.
    """
    path = data / f"{split}set.json"
    folder = next((name for name in _FOLDERS if (data / name).is_dir()), _FOLDERS[0])
    found = []
    for number, row in enumerate(read_rows(path, "copy VQA-RAD's trainset.json and testset.json there"), 1):
        where = f"{shown(path)}, entry {number}"
        answer = field(row, "answer", where)
        found.append(
            question_sample(
                data,
                f"{folder}/{field(row, 'image_name', where)}",
                field(row, "question", where),
                answer,
                doc_id=field(row, "qid", where),
                dataset="VQA-RAD",
                question_type=row.get("question_type"),
                answer_type=answer_type(row.get("answer_type"), answer),
                organ=row.get("image_organ"),
                phrase=row.get("phrase_type"),
            )
        )
    return found
