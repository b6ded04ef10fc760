"""Tests can write down the errors they measured."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import measured
import pytest

pytest_plugins = ["dataset_fixtures"]

# A deadline would test how busy the machine is.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

HEADER = """# Parity

What the comparisons of `tests/` measured. Written by

```sh
pytest tests/parity tests/inference/test_golden.py --parity-page docs/parity.md
```

and checked by `tests/repository/test_parity_page.py`: every comparison is listed and none is above its
tolerance. Errors are relative: the largest difference over the largest value of the reference. All in float32
on a CPU, random weights; the row nearest to its tolerance is shown for a test of several arrays.

- `tests/parity/*`: against the torch modules of transformers and of sam2, gradients included. Where torch is
  absent, `tests/models/test_recorded.py` holds every module to the same tolerance against what torch
  answered (`tests/recorded`).
- `tests/inference/test_golden.py`: the whole predictor against recordings of the reference implementation. It
  asserts more than this table shows: equal token ids and texts, and masks equal but where |logit| < 1e-3.

| test | largest relative error | tolerance |
|---|---|---|
"""


def pytest_addoption(parser):
    parser.addoption("--parity-page", metavar="FILE", help="write the errors that were measured to FILE")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Collect what a worker process of pytest-xdist measured."""
    for test, (error_found, tolerance) in getattr(node, "workeroutput", {}).get("measured", {}).items():
        measured.keep(test, error_found, tolerance)


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured"] = measured.WORST
        return
    page = session.config.getoption("--parity-page")
    if page and exitstatus == 0:
        rows = [
            f"| {test} | {error:.1e} | {tolerance:.0e} |"
            for test, (error, tolerance) in sorted(measured.WORST.items())
        ]
        Path(page).write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
