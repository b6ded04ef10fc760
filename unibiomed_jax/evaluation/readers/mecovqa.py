"""MeCoVQA: conversations about images of SA-Med2D, with masks that answer, or regions that are asked about.

Beside the tables lies the folder `SAMed2Dv1` that their paths start with. A target is not named by them:
masks are grouped by modality, the file name's part before the first `_`.

MeCoVQA-G+ (huggingface.co/datasets/jdh-algo/MeCoVQA-G-Plus) has the same conversations; its paths start
inside that folder. So its authors' evaluation reads it (eval/eval_segmentation.py of
github.com/jdh-algo/Citrus-V, d3bb13d), from `MeCoVQA_Grounding_test_merged_modified_v3.json`. How its table
for training is called is not known: it is not read.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.readers.questions import (
    answer_type,
    field,
    groups,
    is_file,
    question_sample,
    read_rows,
)
from unibiomed_jax.evaluation.records import EncodedMasks, Sample, encode_masks
from unibiomed_jax.evaluation.reference_folders import read_values
from unibiomed_jax.files import shown
from unibiomed_jax.inputs.prompt import IMAGE

_MASK = re.compile(r"<mask>(.*?)</mask>")
_REGION = re.compile(r"<region>(.*?)</region>")
# The model knows a region by the green box that is drawn around it.
_BOX = "<region>"
_PARTS = ("Complex", "Region", "Grounding")
_IMAGES = "SAMed2Dv1"
# In the names of the tables of MeCoVQA-G+.
_PLUS = "Grounding_test_merged"


def read_mecovqa(data: Path, split: str) -> list[Sample]:
    """Every turn of every conversation of a split, train or test, as a record.

    Tables are known by their names: `MeCoVQA_Grounding_test.json`, `MeCoVQA-Complex.json` (train).

    Raises:
        InputError: there is no table of the split, or a damaged one.
    """
    paths = [
        path
        for path in sorted(data.glob("MeCoVQA*.json"))
        if any(part in path.name for part in _PARTS) and ("test" in path.stem.lower()) == (split == "test")
    ]
    if split not in ("train", "test") or not paths:
        raise InputError(
            f"{shown(data)} has no table of MeCoVQA for the split {split!r}, such as "
            "MeCoVQA_Grounding_test.json; correct --data or --split."
        )
    found = []
    for path in paths:
        part = "G+" if _PLUS in path.name else next(part for part in _PARTS if part in path.name)
        for number, row in enumerate(read_rows(path, "download MeCoVQA again"), 1):
            where = f"{shown(path)}, entry {number}"
            turns = row.get("conversations")
            if (
                not isinstance(turns, list)
                or len(turns) % 2
                or not all(isinstance(turn, dict) for turn in turns)
            ):
                raise InputError(f"{where} has no conversation of questions and answers; download it again.")
            for turn in range(0, len(turns), 2):
                asked, said = (field(each, "value", where) for each in turns[turn : turn + 2])
                found.append(
                    _sample(data, row, part, f"{path.stem}/{number}/{turn // 2 + 1}", asked, said, where)
                )
    return found


def _sample(data: Path, row: dict, part: str, doc_id: str, asked: str, said: str, where: str) -> Sample:
    image = _placed(data, field(row, "image", where))
    modality = Path(image).name.split("_")[0]
    outlined, regions = _MASK.findall(said), _REGION.findall(asked)
    asked = _REGION.sub(_BOX, asked).replace(IMAGE, "").strip()
    said = " ".join(_MASK.sub("", said).replace("<SEG>", "").split())
    if not outlined and not regions:
        return question_sample(
            data,
            image,
            asked,
            said,
            doc_id=doc_id,
            dataset=f"MeCoVQA {part}",
            modality=modality,
            answer_type=answer_type(row.get("answer_type"), said),
        )
    masks, reason = _masks(data, outlined or regions)
    if not is_file(data / image):
        reason = f"the image {shown(image)} is missing; copy it there"
    return Sample(
        "seg2d" if outlined else "region",
        doc_id,
        f"{IMAGE}{asked}" if outlined else f"{IMAGE}\n{asked}",
        answer=None if outlined else said,
        category=modality if outlined else "",
        dataset=f"MeCoVQA {part}",
        groups=groups(
            modality=modality, answer_type=None if outlined else answer_type(row.get("answer_type"), said)
        ),
        image=image,
        truth_masks=masks,
        reason=reason,
    )


def _placed(data: Path, name: str) -> str:
    """A file by its path from the folder of the tables on."""
    inside = f"{_IMAGES}/{name}"
    return inside if not is_file(data / name) and is_file(data / inside) else name


def _masks(data: Path, names: list[str]) -> tuple[EncodedMasks, str | None]:
    """The masks of these files, or the reason why there are none."""
    masks = []
    for name in names:
        try:
            values = read_values(data / _placed(data, name))
        except InputError as error:
            return (), str(error)
        masks.append(np.asarray(values if values.ndim == 2 else values[..., 0]) >= 1)
    return encode_masks(masks), None
