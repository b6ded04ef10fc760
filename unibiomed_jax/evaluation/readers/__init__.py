"""Datasets as their authors publish them, as records to be asked: a file for each layout.

`FORMATS` is the table of all; `known.csv` says where the published ones come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.own_format import read_own_format
from unibiomed_jax.evaluation.readers.biomedparse import read_biomedparse
from unibiomed_jax.evaluation.readers.mecovqa import read_mecovqa
from unibiomed_jax.evaluation.readers.omnimedvqa import read_omnimedvqa
from unibiomed_jax.evaluation.readers.parquet import read_parquet
from unibiomed_jax.evaluation.readers.reference import read_reference
from unibiomed_jax.evaluation.readers.slake import read_slake
from unibiomed_jax.evaluation.readers.table import read_table
from unibiomed_jax.evaluation.readers.vqa_rad import read_vqa_rad
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import locate, shown

# Each takes the folder (or the file) and the split, and gives all records of them.
FORMATS: dict[str, Callable[[Path, str], list[Sample]]] = {
    "unibiomed": lambda data, split: read_own_format(data, split, ()),
    "reference": read_reference,
    "biomedparse": read_biomedparse,
    "mecovqa": read_mecovqa,
    "slake": read_slake,
    "vqa-rad": read_vqa_rad,
    "parquet": read_parquet,
    "omnimedvqa": read_omnimedvqa,
    "table": read_table,
}


def read_records(
    data: str | Path,
    split: str,
    tasks: Sequence[str],
    datasets: Sequence[str] = (),
    format: str = "unibiomed",
) -> list[Sample]:
    """The records of a folder (or of a file with questions and answers) in one of `FORMATS`.

    Args:
        data: where they lie.
        split: which part.
        tasks: of these, or of all.
        datasets: of datasets of these names, or of all.
        format: how they are laid out.

    Raises:
        InputError: there are no such records, a table is wrong, or two records share a name.
    """
    data = locate(data)
    if format == "unibiomed":
        return read_own_format(data, split, tasks, datasets)
    if not data.exists():
        raise InputError(f"{shown(data)} does not exist; correct --data.")
    found = FORMATS[format](data, split)
    unknown = set(datasets) - {sample.dataset for sample in found}
    if unknown:
        raise InputError(
            f"{shown(data)} has no dataset {', '.join(map(shown, sorted(unknown)))} in the split {split!r}, "
            f"but {', '.join(sorted({shown(sample.dataset) for sample in found}))}; correct --datasets."
        )
    kept = [
        sample
        for sample in found
        if (not tasks or sample.task in tasks) and (not datasets or sample.dataset in datasets)
    ]
    missing = [task for task in tasks if not any(sample.task == task for sample in kept)]
    if missing or not kept:
        raise InputError(
            f"{shown(data)} has no record of {', '.join(missing) or 'any task'} in the split {split!r}; "
            "correct --data, --format, --split or --task."
        )
    names: set[tuple[str, str]] = set()
    for sample in kept:
        if (sample.task, sample.doc_id) in names:
            raise InputError(
                f"{shown(data)} has two records {shown(sample.doc_id)} of {sample.task}; rename one of them."
            )
        names.add((sample.task, sample.doc_id))
    return kept


def image_folder(data: str | Path) -> Path:
    """The folder that images' names start from: that of a table, where `data` is one."""
    data = locate(data)
    return data.parent if data.is_file() else data
