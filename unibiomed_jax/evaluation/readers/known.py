"""What can be evaluated, with its licence and where to get it, as far as its authors say."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple


class KnownDataset(NamedTuple):
    # As `--format` takes it.
    format: str
    name: str
    tasks: str
    splits: str
    licence: str
    where: str


def known_datasets() -> list[KnownDataset]:
    """The table `known.csv`."""
    with Path(__file__).with_name("known.csv").open(encoding="utf-8") as file:
        return [KnownDataset(**row) for row in csv.DictReader(file)]
