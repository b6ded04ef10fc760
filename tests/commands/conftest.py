"""The command line as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.fixture
def unibiomed(tmp_path):
    """Runs `unibiomed` in an empty folder."""

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "unibiomed_jax.cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "500"},
            capture_output=True,
            text=True,
        )

    return command
