"""BiomedParseData: folders `{split}` and `{split}_mask` beside `{split}.json`, as in our own format, but an
annotation may leave out the name of its mask, which is then the image's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.records import Kind
from unibiomed_jax.evaluation.own_format import read_table_records
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import read_json


def read_biomedparse(data: Path, split: str) -> list[Sample]:
    """All targets of all datasets in a folder; of the demo set with the split "demo".

    Raises:
        InputError: there is no table of the split, or a damaged one.
    """
    found: list[Sample] = []
    for config in find_datasets(data, split, balance_to=0, repeats=1):
        if config.kind is Kind.SEGMENTATION:
            table = with_mask_names(read_json(config.annotation_path, unique_keys=True))
            found += read_table_records(config, data, table)
    return found


def with_mask_names(table: Any) -> Any:
    """The table with a mask's name in every annotation."""
    if isinstance(table, dict) and isinstance(table.get("annotations"), list):
        for annotation in table["annotations"]:
            if isinstance(annotation, dict) and "file_name" in annotation:
                annotation.setdefault("mask_file", annotation["file_name"])
    return table
