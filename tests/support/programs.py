"""What a compiled program moves between devices, read from its text."""

import re
from collections import Counter
from typing import NamedTuple

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
SHAPE = re.compile(r"\b(pred|[a-z]+(\d+))\[([0-9,]*)\]")
INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# A row of a table that is an argument of the program.
ARGUMENT = re.compile(r""" parameter\(\d+\).*op_name="[\w.]+\[\\?'([\w.]+)\\?'\]\"""")


class Moved(NamedTuple):
    """A collective operation."""

    kind: str
    # Of everything that it moves, as the receiving device has it.
    shapes: tuple[tuple[int, ...], ...]
    # Of all of them.
    bytes: int
    # How often it runs; a branch counts as taken. Below 0 in a loop of unknown length.
    times: int


def collectives(text: str) -> list[Moved]:
    """All collective operations of the text of a compiled program."""
    times, found, inside = _times(text), [], ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            inside = head[2]
        if match := INSTRUCTION.search(line):
            shapes, size = [], 0
            for _, bits, dims in SHAPE.findall(match[1]):
                shapes.append(tuple(int(length) for length in dims.split(",") if length))
                count = 1
                for length in shapes[-1]:
                    count *= length
                size += count * int(bits or 8) // 8
            found.append(Moved(match[2], tuple(shapes), size, times[inside]))
    return found


def arguments(text: str) -> set[str]:
    """Names of the rows that a compiled program takes of its tables: those that it needs."""
    return set(ARGUMENT.findall(text))


def _times(text: str) -> Counter:
    """How often each computation of a program runs; below 0 in a loop of unknown length."""
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = inside = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            inside = head[2]
            calls[inside] = []
            entry = inside if head[1] else entry
        elif inside:
            trips = 1
            if " while(" in line:
                known = TRIPS.search(line)
                trips = int(known[1]) if known else -1
            branches = BRANCHES.search(line)
            names = CALLED.findall(line) + (re.split(r",\s*", branches[1]) if branches else [])
            calls[inside] += [(name.lstrip("%"), trips) for name in names]
    times: Counter = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for called, trips in calls.get(name, ()):
            visit(called, -1 if min(count, trips) < 0 else count * trips)

    visit(entry, 1)
    return times
