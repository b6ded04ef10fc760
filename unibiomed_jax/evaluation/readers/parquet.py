"""PathVQA and other sets of questions as Hugging Face keeps them: `data/SPLIT-*.parquet` with the columns
image, question and answer, the image within the file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.readers.questions import answer_type, field, question_sample
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import in_bucket, shown, write_beside

# Images are unpacked there, each once: PathVQA asks several questions about one.
UNPACKED = "unpacked_images"
# By the first bytes of a file.
_ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}


def read_parquet(data: Path, split: str) -> list[Sample]:
    """All questions of a split. Without types, a question is closed if its answer is yes or no.

    Images are written to the folder `unpacked_images` beside the files, unless they are there.

    Raises:
        InputError: pyarrow is not installed, there is no file of the split, one is damaged, or the folder
            cannot be written.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(
            "Parquet files need pyarrow; install it: pip install 'unibiomed-jax[eval]'."
        ) from None
    if in_bucket(data):
        raise InputError(
            f"Images are unpacked beside parquet files, which a bucket does not allow; copy {shown(data)} to "
            "a disk."
        )
    paths = sorted(data.rglob(f"{split}-*.parquet")) or sorted(data.rglob(f"{split}.parquet"))
    if not paths:
        raise InputError(
            f"{shown(data)} has no {split}-*.parquet; download the dataset, or correct --data or --split."
        )
    found: list[Sample] = []
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64):
                    found += [
                        _sample(data, path, len(found) + n, row) for n, row in enumerate(batch.to_pylist())
                    ]
        except ArrowException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{shown(path)} is damaged ({reason}); download it again.") from None
    return found


def _sample(data: Path, path: Path, number: int, row: dict[str, Any]) -> Sample:
    where = f"{shown(path)}, question {number}"
    image = row.get("image")
    content = image.get("bytes") if isinstance(image, dict) else None
    if not content:
        raise InputError(f"{where} has no image within the file; download one that has.")
    name = f"{hashlib.sha256(content).hexdigest()[:16]}{_ENDINGS.get(content[:2], '')}"
    place = data / UNPACKED / name
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        write_beside(place, content)
    answer = field(row, "answer", where)
    return question_sample(
        data,
        f"{UNPACKED}/{name}",
        field(row, "question", where),
        answer,
        doc_id=str(number),
        dataset=data.resolve().name,
        modality=row.get("modality"),
        question_type=row.get("question_type"),
        answer_type=answer_type(row.get("answer_type"), answer),
    )
