"""UniBiomed's own datasets: all that its training and its scripts name, in the folders that they name.

`reference.csv` holds them: the name in the training's configuration (none for those that are only tested),
the kind of task, the folder below data/Biomed, whether it is trained on, whether the scripts evaluate it.
One table (`test.json`) serves several tasks, so that they cannot be told by their files.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.own_format import TASK_OF_KIND, read_table_records
from unibiomed_jax.evaluation.readers.biomedparse import with_mask_names
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.files import read_json, shown


class ReferenceDataset(NamedTuple):
    name: str
    kind: Kind
    folder: str
    trained: bool
    evaluated: bool

    @property
    def task(self) -> str:
        return TASK_OF_KIND[self.kind]

    def config(self, data: Path, split: str) -> DatasetConfig:
        """Where it lies below data/Biomed."""
        return DatasetConfig(
            self.kind, str(data / self.folder), name=f"{self.folder}/{self.kind}", split=split
        )


def reference_datasets() -> list[ReferenceDataset]:
    """All of them, in the order of the training."""
    with Path(__file__).with_name("reference.csv").open(encoding="utf-8") as file:
        return [
            ReferenceDataset(
                row["name"],
                Kind(row["kind"]),
                row["folder"],
                row["trained"] == "yes",
                row["evaluated"] == "yes",
            )
            for row in csv.DictReader(file)
        ]


def read_reference(data: Path, split: str) -> list[Sample]:
    """The records of all that is there, in the order of the tables: the paper's protocol takes the first 300.

    Raises:
        InputError: nothing is there, or a table is damaged.
    """
    found: list[Sample] = []
    for dataset in reference_datasets():
        config = dataset.config(data, split)
        if not config.annotation_path.is_file():
            continue
        table = with_mask_names(read_json(config.annotation_path, unique_keys=True))
        if dataset.kind is Kind.SEGMENTATION:
            table = _with_sentences(table)
        of_dataset = list(read_table_records(config, data, table))
        if dataset.kind is Kind.SEGMENTATION:
            of_dataset = _in_order(of_dataset, table, dataset.folder)
        if dataset.kind is Kind.REPORT:
            of_dataset = _with_captions(of_dataset, data / dataset.folder / f"{split}.json")
        found += of_dataset
    if not found:
        raise InputError(
            f"{shown(data)} holds none of UniBiomed's datasets with a split {split!r} (such as "
            f"ACDC/{split}.json); name the folder Biomed with --data."
        )
    return found


def _with_sentences(table: Any) -> Any:
    """The scripts ask for the first sentence as `sent` spells it."""
    for annotation in table.get("annotations", ()) if isinstance(table, dict) else ():
        sentences = annotation.get("sentences") if isinstance(annotation, dict) else None
        if isinstance(sentences, list) and sentences and isinstance(sentences[0], dict):
            first = sentences[0]
            annotation["sentences"] = [{**first, "raw": first.get("sent", first.get("raw"))}]
    return table


def _with_captions(samples: list[Sample], path: Path) -> list[Sample]:
    """Reports are compared with the captions of images that have one annotation; others are not judged."""
    captions: dict[str, list[Any]] = {}
    table = read_json(path) if path.is_file() else {}
    for annotation in table.get("annotations", ()) if isinstance(table, dict) else ():
        if isinstance(annotation, dict) and isinstance(annotation.get("file_name"), str):
            captions.setdefault(PurePosixPath(annotation["file_name"]).name, []).append(
                annotation.get("caption")
            )
    kept = []
    for sample in samples:
        caption, *others = captions.get(PurePosixPath(sample.image).name, [None])
        kept.append(replace(sample, answer=caption if isinstance(caption, str) and not others else None))
    return kept


def _in_order(samples: list[Sample], table: Any, folder: str) -> list[Sample]:
    """As the annotations stand in the table, not by image."""
    places: dict[str, int] = {}
    for number, annotation in enumerate(table["annotations"]):
        places.setdefault(str(PurePosixPath(folder) / annotation["mask_file"]), number)

    def place(sample: Sample) -> int:
        """Of its mask; a name ends in # and a number only where one mask has several records."""
        name = sample.doc_id
        return places[name if name in places else name.rpartition("#")[0]]

    return sorted(samples, key=place)
