"""What stands in the text of a compiled program: loops, collectives, memory traffic, large buffers.

The text is XLA's HLO after optimisation, of one device. Bytes and counts are those that the text states; how
often a loop runs is read from its condition.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What moves nothing: names for, and views of, what is there.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "iota",
}
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation|select|scatter)=%?([\w.\-]+)|"
    r"\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{\d+,\d+\}(?:,\{\d+,\d+\})*)\}")
# The compiler's on-chip memories (scratch, flags): arrays there ask nothing of the large one.
_ON_CHIP = re.compile(r"S\([1-9]\)")


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    # Shape of its result, as written.
    shape: str
    operation: str
    operands: tuple[str, ...]
    # All that stands behind its name.
    text: str


class Collective(NamedTuple):
    """One kind of exchange between devices."""

    kind: str
    # Mesh axes over which it goes.
    axes: tuple[str, ...]
    # Devices that exchange with one another.
    group: int
    in_loop: bool
    # A device's, of the largest of its arrays, loops counted as often as they run.
    bytes: float
    # How often it runs.
    times: float


@dataclass
class ProgramText:
    """A parsed program."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    # How often each computation runs, and in how many loops it stands.
    times: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    depth: dict[str, int] = field(default_factory=dict)
    # Computations inside of fusions and reductions, which touch no memory themselves.
    inner: set[str] = field(default_factory=set)
    # Those in which an asynchronous exchange starts. It goes on in others, that may be loops over anything.
    starts: set[str] = field(default_factory=set)
    # Loops whose condition does not say how often they run.
    unknown_loops: int = 0


def parse(text: str, unknown_trips: int = 1) -> ProgramText:
    """Read a program; loops of unknown length count `unknown_trips` times."""
    program, inside = ProgramText(), ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            inside = head[2]
            program.computations[inside] = []
            program.entry = inside if head[1] else program.entry
        elif inside and (found := _INSTRUCTION.match(line)):
            shape, operation, operands = _parts(found[3])
            program.computations[inside].append(Instruction(found[2], shape, operation, operands, found[3]))
    _visit(program, program.entry, 1.0, 0, False, unknown_trips)
    return program


def _parts(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Shape, operation and operands of an instruction."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opened = rest.find("(")
    operands = rest[opened : _closing(rest, opened) + 1] if opened >= 0 else ""
    return shape, rest[: max(opened, 0)], tuple(_OPERAND.findall(operands))


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def _visit(program: ProgramText, name: str, times: float, depth: int, inner: bool, unknown: int) -> None:
    program.times[name] += times
    program.depth[name] = max(depth, program.depth.get(name, 0))
    if inner:
        program.inner.add(name)
    for instruction in program.computations.get(name, ()):
        if instruction.operation == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.text)[1]
            condition = re.search(r"condition=%?([\w.\-]+)", instruction.text)[1]
            trips = _trips(program, instruction, condition)
            program.unknown_loops += trips is None
            runs = times * (unknown if trips is None else trips)
            _visit(program, body, runs, depth + 1, inner, unknown)
            _visit(program, condition, runs, depth + 1, True, unknown)
            continue
        plain = instruction.operation in ("call", "conditional", "async-start")
        for one, several in _CALLED.findall(instruction.text):
            for called in [one] if one else several.split(","):
                if instruction.name.startswith("async-collective-start"):
                    program.starts.add(called.strip().lstrip("%"))
                _visit(program, called.strip().lstrip("%"), times, depth, inner or not plain, unknown)


def _trips(program: ProgramText, loop: Instruction, condition: str) -> int | None:
    """How often a loop runs: as the compiler says, or the bound that its counter is compared with."""
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    lines = program.computations[condition]
    constants = {
        line.name: int(found[1])
        for line in lines
        if (found := re.search(r"constant\((-?\d+)\)", line.text)) and "[]" in line.shape
    }
    root = lines[-1]
    if root.operation == "compare" and "direction=LT" in root.text and root.operands[-1] in constants:
        return constants[root.operands[-1]]
    return None


def shape_bytes(shape: str, *, on_chip: bool = True) -> int:
    """Bytes of a shape as written; `on_chip`: of what lies in the compiler's own small memories, too."""
    total = 0
    for dtype, sizes, layout in _SHAPE.findall(shape):
        if on_chip or not _ON_CHIP.search(layout):
            total += _array_bytes(dtype, sizes)
    return total


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) if dtype != "token" else 0
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def parts_of(shape: str) -> list[int]:
    """Bytes of every array of a tuple."""
    return [_array_bytes(dtype, sizes) for dtype, sizes, _ in _SHAPE.findall(shape)]


# ------------------------------------------------------------------------------------------------------------
# Collectives


def collectives(program: ProgramText, mesh: Mapping[str, int]) -> list[Collective]:
    """All exchanges between devices, those of one kind, place and mesh axes together.

    An asynchronous exchange stands in several fusions, from its start to its end, under one channel: it is
    counted once, as often as it starts.
    """
    seen: dict[object, Collective] = {}
    for name, instructions in _starts_last(program):
        for line in instructions:
            kind = line.operation.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sizes = parts_of(line.shape)
            size = max(sizes, default=0) if line.operation.endswith("-start") else sum(sizes)
            if kind == "reduce-scatter" and line.operation == kind:  # what goes in is what is exchanged
                size *= group_size(line.text, mesh)
            if "all-reduce-scatter" in name:  # the part of a sum that a fusion keeps
                kind = "reduce-scatter"
            axes, group = axes_of(line.text, mesh)
            channel = re.search(r"channel_id=(\d+)", line.text)
            key = (kind, channel[1]) if channel else (name, line.name)
            times = program.times[name]
            if key not in seen or seen[key].times < times or name in program.starts:
                seen[key] = Collective(kind, axes, group, program.depth[name] > 0, size * times, times)
    merged: dict[tuple, Collective] = {}
    for one in seen.values():
        key = one[:4]
        so_far = merged.get(key, one._replace(bytes=0.0, times=0.0))
        merged[key] = so_far._replace(bytes=so_far.bytes + one.bytes, times=so_far.times + one.times)
    return sorted(merged.values(), key=lambda one: -one.bytes)


def _starts_last(program: ProgramText) -> list[tuple[str, list[Instruction]]]:
    """The computations that run, those in which exchanges start behind all others."""
    runs = [(name, lines) for name, lines in program.computations.items() if program.times.get(name)]
    return sorted(runs, key=lambda computation: computation[0] in program.starts)


def group_size(text: str, mesh: Mapping[str, int]) -> int:
    """Devices of a group of a collective."""
    return len(_groups(text, math.prod(mesh.values()))[0])


def axes_of(text: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group differ, and how many devices a group has."""
    places = np.indices(tuple(mesh.values())).reshape(len(mesh), -1)
    groups = _groups(text, places.shape[1])
    differs = np.zeros(len(mesh), bool)
    for group in groups:
        differs |= (places[:, group] != places[:, group[:1]]).any(1)
    axes = tuple(axis for axis, differ in zip(mesh, differs, strict=True) if differ)
    return axes, len(groups[0])


def _groups(text: str, devices: int) -> list[list[int]]:
    """Devices that exchange with one another, by their number in the mesh."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",") if number]

    if pairs := _PAIRS.search(text):
        return [numbers(pair) for pair in pairs[1].strip("{}").split("},{")]
    if groups := _GROUPS.search(text):
        return [numbers(group) for group in groups[1].strip("{}").split("},{")]
    if iota := _IOTA.search(text):
        order = np.arange(devices).reshape(numbers(iota[2]))
        order = order.transpose(numbers(iota[3])) if iota[3] else order
        return order.reshape(numbers(iota[1])).tolist()
    if mesh := _MESH.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'([^']+)'", mesh[2])
        order = np.arange(devices).reshape(tuple(sizes.values()))
        last = [place for place, name in enumerate(sizes) if name in chosen]
        first = [place for place in range(len(sizes)) if place not in last]
        width = math.prod(sizes[name] for name in chosen)
        return order.transpose(first + last).reshape(-1, width).tolist()
    return [list(range(devices))]


# ------------------------------------------------------------------------------------------------------------
# Memory


def traffic(program: ProgramText) -> float:
    """Bytes that a device reads from and writes to its large memory, loops as often as they run.

    Every instruction reads its operands and writes its result, a fusion only what goes in and out of it; of
    an operand that is only sliced, the slices; of one that is updated in place, the update. What an
    asynchronous exchange reads and writes goes through all fusions from its start to its end; it counts once.
    """
    total = 0.0
    exchanged: dict[str, float] = {}
    for name, instructions in _starts_last(program):
        times = program.times[name]
        shapes = {line.name: line.shape for line in instructions}
        if name not in program.inner:
            total += times * sum(_moved(program, line, shapes) for line in instructions)
            continue
        for line in instructions:
            if line.operation in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", line.text)
                size = shape_bytes(line.shape, on_chip=False) if line in _handed_on(instructions) else 0
                size += sum(shape_bytes(shapes.get(operand, ""), on_chip=False) for operand in line.operands)
                key = channel[1] if channel else f"{name} {line.name}"
                started = name in program.starts
                exchanged[key] = times * size if started else max(exchanged.get(key, 0), times * size)
    return total + sum(exchanged.values())


def _moved(program: ProgramText, line: Instruction, shapes: Mapping[str, str]) -> int:
    operation = line.operation
    if operation in _FREE or operation in ("while", "conditional", "call") or operation.endswith("-done"):
        return 0
    result = shape_bytes(line.shape, on_chip=False)
    operands = [shape_bytes(shapes.get(name, ""), on_chip=False) for name in line.operands]
    if operation == "slice-start":  # its result is ((all), slice, flag)
        dtype, sizes, layout = _SHAPE.findall(line.shape)[-2]
        return _array_bytes(dtype, sizes) * (1 if _ON_CHIP.search(layout) else 2)
    if operation.endswith("-start"):  # its result is (from, to, flag)
        return result
    if operation in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if operation == "dynamic-update-slice":
        return 2 * (operands[1] if len(operands) > 1 else 0)
    called = re.search(r"\bcalls=%?([\w.\-]+)", line.text) if operation == "fusion" else None
    if called:
        reads, in_place = _of_fusion(program, called[1])
        operands = [min(size, reads.get(number, size)) for number, size in enumerate(operands)]
        result = max(0, result - in_place)
    return result + sum(operands)


def _handed_on(instructions: Sequence[Instruction]) -> list[Instruction]:
    """What a fusion gives back as it is: what it was given, and results of exchanges."""
    made = {line.name: line for line in instructions}
    given = instructions[-1:]
    if given and given[0].operation == "tuple":
        given = [made[name] for name in given[0].operands if name in made]
    return [line for line in given if line.operation in ("parameter", *COLLECTIVES)]


def _of_fusion(program: ProgramText, name: str) -> tuple[dict[int, int], int]:
    """Bytes that a fusion reads of operands that it only slices; bytes of its result that it leaves alone."""
    instructions = program.computations.get(name, ())
    made = {line.name: line for line in instructions}
    users: dict[str, list[Instruction]] = defaultdict(list)
    for line in instructions:
        for operand in line.operands:
            users[operand].append(line)

    def consumers(name: str) -> Iterator[tuple[str, Instruction]]:
        for user in users[name]:
            if user.operation == "bitcast":
                yield from consumers(user.name)
            else:
                yield name, user

    reads: dict[int, int] = {}
    left_alone = sum(shape_bytes(line.shape, on_chip=False) for line in _handed_on(instructions))
    for line in instructions:
        if line.operation == "dynamic-update-slice":
            update = made.get(line.operands[1])
            if update is not None:
                left_alone += shape_bytes(line.shape, on_chip=False) - shape_bytes(update.shape)
        if line.operation != "parameter":
            continue
        number = int(re.search(r"parameter\((\d+)\)", line.text)[1])
        sizes = []
        for name, user in consumers(line.name):
            if user.operation in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                sizes.append(shape_bytes(user.shape))
            elif user.operation == "dynamic-update-slice" and user.operands[0] == name:
                sizes.append(0)  # where the update goes, counted with the result
            elif user.operation in COLLECTIVES or (user is instructions[-1] and user.operation == "tuple"):
                sizes.append(0)  # an exchange, counted for itself
            elif user.operation == "fusion":  # in which it may be sliced
                within, _ = _of_fusion(program, re.search(r"\bcalls=%?([\w.\-]+)", user.text)[1])
                places = [place for place, operand in enumerate(user.operands) if operand == name]
                if not all(place in within for place in places):
                    break
                sizes += [within[place] for place in places]
            else:
                break
        else:
            if sizes:
                reads[number] = sum(sizes)
    return reads, left_alone


def largest(program: ProgramText, count: int = 5) -> list[tuple[int, str, str]]:
    """The largest arrays that a program makes: bytes, shape, and what the source calls it."""
    found: dict[tuple[str, str], int] = {}
    for name, instructions in program.computations.items():
        if name in program.inner or not program.times.get(name):
            continue
        for line in instructions:
            if line.operation in _FREE | {"while", "conditional", "call"} or line.operation.endswith("-done"):
                continue
            for dtype, sizes, layout in _SHAPE.findall(line.shape):
                if not _ON_CHIP.search(layout):
                    called = re.search(r'op_name="([^"]*)"', line.text)
                    found[f"{dtype}[{sizes}]", called[1][-80:] if called else ""] = _array_bytes(dtype, sizes)
    seen: dict[str, tuple[int, str, str]] = {}
    for (shape, where), size in sorted(found.items(), key=lambda item: -item[1]):
        seen.setdefault(shape, (size, shape, where))
    return list(seen.values())[:count]


def kept_for_backward(program: ProgramText) -> int:
    """Bytes that the forward pass keeps for the backward pass, as the schedule of the text has it.

    The most, at any time, of what instructions of the forward pass have made and those of the backward pass
    will still read; views and loops count as what they are made of. 0 where there is no backward pass.
    """
    lines = program.computations[program.entry]
    roots: dict[str, dict[int, set[str]]] = {}
    sizes: dict[str, int] = {}
    made: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, line in enumerate(lines):
        arrays = _SHAPE.findall(line.shape)
        operation = line.operation
        if operation == "parameter":
            roots[line.name] = {number: set() for number in range(len(arrays))}
        elif operation == "tuple":
            parts = (roots.get(name, {}).values() for name in line.operands)
            roots[line.name] = {number: set().union(*part) for number, part in enumerate(parts)}
        elif operation == "get-tuple-element":
            number = int(re.search(r"index=(\d+)", line.text)[1])
            roots[line.name] = {0: roots.get(line.operands[0], {}).get(number, set())}
        elif operation in ("bitcast", "while", "opt-barrier") or operation.endswith("-done"):
            roots[line.name] = roots.get(line.operands[0], {})
        else:
            roots[line.name] = {}
            for number, (dtype, dims, layout) in enumerate(arrays):
                root = f"{line.name}.{number}"
                roots[line.name][number] = {root}
                if "transpose(" not in line.text and not _ON_CHIP.search(layout):
                    made[root], sizes[root] = place, _array_bytes(dtype, dims)
        if "transpose(" in line.text and operation not in ("tuple", "get-tuple-element"):
            for name in line.operands:
                last |= dict.fromkeys(set().union(*roots.get(name, {}).values()), place)
    changes = np.zeros(len(lines) + 1)
    for root, place in last.items():
        if root in made:
            changes[made[root]] += sizes[root]
            changes[place] -= sizes[root]
    return int(changes.cumsum().max(initial=0))
