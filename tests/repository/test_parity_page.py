"""docs/parity.md is complete and keeps its promises."""

from __future__ import annotations

import ast
import re

from places import TESTS

PAGE = TESTS.parent / "docs" / "parity.md"
COMPARISONS = {"assert_close", "assert_all_close", "assert_gradients_close"}


def rows() -> dict[str, tuple[float, float]]:
    found = re.findall(
        r"^\| (tests/\S+) \| (\S+) \| (\S+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {test: (float(error), float(tolerance)) for test, error, tolerance in found}


def comparisons() -> set[str]:
    """Every test function that compares with a measured error, straight from the sources."""
    found = set()
    for file in [*TESTS.glob("parity/test_*.py"), TESTS / "inference" / "test_golden.py"]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            called = {
                n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            }
            if called & COMPARISONS:
                found.add(f"{file.relative_to(TESTS.parent)}::{node.name}")
    return found


def test_every_comparison_is_listed():
    assert comparisons() == set(rows())


def test_no_error_is_above_its_tolerance():
    assert rows()
    for test, (error, tolerance) in rows().items():
        assert error <= tolerance <= 1e-4, test
