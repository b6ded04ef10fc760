"""What a compiled program moves between devices, read from its text."""

import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([0-9,]*)\]")
INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) (?:{KINDS})(?:-start)?\(")


class Moved(NamedTuple):
    """A collective operation; one that stands in a loop counts once."""

    kind: str
    # Of everything that it moves, as the receiving device has it.
    shapes: tuple[tuple[int, ...], ...]


def collectives(text: str) -> list[Moved]:
    """All collective operations of the text of a compiled program."""
    found = []
    for line in text.splitlines():
        match = INSTRUCTION.search(line)
        if match:
            kind = re.search(KINDS, line[match.start(1) + len(match[1]) :])[0]
            shapes = tuple(
                tuple(int(size) for size in dims.split(",") if size) for _, dims in SHAPE.findall(match[1])
            )
            found.append(Moved(kind, shapes))
    return found
