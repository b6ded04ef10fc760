"""Comparison with a reference by relative error; what was measured is kept for the page docs/parity.md."""

from __future__ import annotations

import os

import numpy as np

# Test (file::function) -> (largest relative error, the tolerance it was held to).
WORST: dict[str, tuple[float, float]] = {}


def note(error: float, tolerance: float) -> None:
    """Remember a comparison of the running test."""
    keep(os.environ["PYTEST_CURRENT_TEST"].split(" ")[0].split("[")[0], float(error), tolerance)


def keep(test: str, error: float, tolerance: float) -> None:
    """Of all comparisons of a test, the one that came nearest to its tolerance stays."""
    before = WORST.get(test)
    if before is None or error / tolerance > before[0] / before[1]:
        WORST[test] = (error, tolerance)


def relative_error(ours, theirs):
    """Largest absolute difference over the largest absolute value of `theirs`."""
    ours, theirs = (
        np.asarray(x.detach().float() if hasattr(x, "detach") else x, np.float64) for x in (ours, theirs)
    )
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)


def assert_close(ours, theirs, tolerance, what=""):
    error = relative_error(ours, theirs)
    note(error, tolerance)
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


def assert_all_close(ours, theirs, tolerance):
    """Compare two dictionaries of arrays by path; they must have the same paths."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    for path in ours:
        assert_close(ours[path], theirs[path], tolerance, path)
