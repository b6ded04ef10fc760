"""Predictions made up for tests, and what the reference's own scorers give for them (README.md inside)."""

import zipfile
from pathlib import Path

import pytest
from places import FILES


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(FILES / "eval_golden.zip") as archive:
        archive.extractall(folder)
    return folder
