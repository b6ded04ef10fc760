"""A plan for people: lines that say what is a fact and what an estimate, as a table, JSON and a page."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from unibiomed_jax.planning.facts import Facts
from unibiomed_jax.planning.roofline import SAMPLES, UPDATES, estimate
from unibiomed_jax.planning.topologies import find_topology

# Where a number is from. The first three are facts.
LAYOUT, PROGRAM, COMPILER, ESTIMATE = "fact: layout", "fact: program", "fact: compiler", "estimate"
GIB = 2**30


class Line(NamedTuple):
    """One thing that a plan says."""

    name: str
    value: str
    source: str


def fits(facts: Facts) -> tuple[bool, float]:
    """Whether a program fits its chips, and how many bytes a device are left, or missing below 0."""
    compiled = facts.compiled
    if compiled.refused is not None:
        asked, there = compiled.refused
        return False, there - asked
    left = find_topology(facts.topology).chip.room - compiled.peak - facts.idle
    return left >= 0, left


def lines(facts: Facts) -> list[Line]:
    """All that a plan says."""
    compiled, topology = facts.compiled, find_topology(facts.topology)
    found = [
        Line("chips", _chips(facts), LAYOUT),
        Line("strategy", f"{facts.strategy} {_mesh(facts)}", LAYOUT),
        Line("samples at a time", f"{facts.samples:,}", LAYOUT),
        *(Line(f"{part}, a device", _bytes(size), LAYOUT) for part, size in facts.held.items()),
    ]
    enough, left = fits(facts)
    there = f"of {_bytes(topology.chip.room)} ({topology.chip.kind})"
    # A TPU's compiler refuses what does not fit; a GPU's knows nothing of the card.
    knows = COMPILER if topology.chip.platform == "tpu" else ESTIMATE
    if compiled.refused is not None:
        asked, room = compiled.refused
        refused = f"no: asks for {_bytes(asked)} of {_bytes(room)}, {_bytes(-left)} too much"
        return [
            *found,
            Line("fits", refused, COMPILER),
            *_arithmetic(facts),
            Line("compilation", _compilation(facts), COMPILER),
        ]
    times = estimate(facts)
    other = max(0, compiled.temporaries - compiled.kept)
    found += [
        Line("kept for the backward pass", _bytes(compiled.kept), ESTIMATE),
        Line("other temporaries", _bytes(other), ESTIMATE),
        Line("all temporaries", _bytes(compiled.temporaries), COMPILER),
        Line("peak", f"{_bytes(compiled.peak + facts.idle)} {there}", COMPILER),
        Line("fits", f"yes, {_bytes(left)} free" if enough else f"no, {_bytes(-left)} too much", knows),
        *_collectives(facts),
        *_arithmetic(facts),
        Line("memory traffic, a device", _bytes(compiled.traffic), ESTIMATE),
        Line("time: compute", _seconds(times.compute), ESTIMATE),
        Line("time: memory", _seconds(times.memory), ESTIMATE),
        Line("time: links", _seconds(times.links), ESTIMATE),
        Line("time: network", _seconds(times.network), ESTIMATE),
        Line("at best", f"{_seconds(times.seconds)}, bound by {times.bound}", ESTIMATE),
    ]
    if times.mfu is not None:
        found.append(Line("MFU", f"{times.mfu:.1%}", ESTIMATE))
    found.append(Line("images a second", _number(times.samples_per_second), ESTIMATE))
    if facts.said:
        found.append(Line("tokens a second", _number(times.tokens_per_second), ESTIMATE))
    if times.reads_per_token is not None:
        found.append(
            Line("read at a token, of parameters and cache", f"{times.reads_per_token:.2f}", ESTIMATE)
        )
    if times.days is not None and times.chip_hours is not None:
        run = f"{times.days:.2f} days, {times.chip_hours:,.0f} chip-hours"
        found.append(Line(f"{UPDATES:,} updates of {SAMPLES}", run, ESTIMATE))
    if compiled.unknown_loops:
        said = f"{compiled.unknown_loops}, taken to run {facts.trips:,} times"
        found.append(Line("loops of unknown length", said, COMPILER))
    found += [
        Line("large array", f"{_bytes(size)} {shape}", COMPILER) for size, shape, _ in compiled.largest[:3]
    ]
    return [*found, Line("compilation", _compilation(facts), COMPILER)]


def _arithmetic(facts: Facts) -> list[Line]:
    found = [
        Line(f"operations, {kind}", f"{count / 1e12:,.3f} T", PROGRAM)
        for kind, count in sorted(facts.operations.items(), key=lambda item: -item[1])
    ]
    found += [Line(f"attention, {tower}", by, PROGRAM) for tower, by in facts.attention.items()]
    if facts.useful:
        found.append(Line("operations that the result needs", f"{facts.useful / 1e12:,.3f} T", ESTIMATE))
    return found


def _collectives(facts: Facts) -> list[Line]:
    found = []
    for one in facts.compiled.collectives:
        if one.bytes >= 2**20 / 20:
            where = "in loops" if one.in_loop else "once"
            found.append(
                Line(f"{one.kind} over {'+'.join(one.axes) or '-'}, {where}", _bytes(one.bytes), COMPILER)
            )
    small = sum(one.bytes for one in facts.compiled.collectives if one.bytes < 2**20 / 20)
    if small:
        found.append(Line("smaller collectives", _bytes(small), COMPILER))
    return found or [Line("collectives", "none", COMPILER)]


def _chips(facts: Facts) -> str:
    return f"{facts.chips:,} of {facts.topology}"


def _mesh(facts: Facts) -> str:
    return ",".join(f"{axis}={size}" for axis, size in facts.mesh.items() if size > 1) or "one device"


def _compilation(facts: Facts) -> str:
    compiled = facts.compiled
    return f"{compiled.seconds:,.0f} CPU seconds, process of {_bytes(compiled.compiler_memory)}"


def _bytes(count: float) -> str:
    if count >= GIB:
        return f"{count / GIB:,.2f} GiB"
    return f"{count / 2**20:,.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


# ------------------------------------------------------------------------------------------------------------
# Table, JSON, page


def title(facts: Facts) -> str:
    name = facts.title if facts.title.endswith(facts.program) else f"{facts.title}, {facts.program}"
    return f"{name} on {facts.topology}, {facts.strategy}"


def table(facts: Facts) -> Table:
    """One plan."""
    made = Table("what", "value", "is a", title=title(facts))
    for line in lines(facts):
        made.add_row(*line)
    return made


def side_by_side(plans: Sequence[Facts]) -> Table:
    """Several plans, one a column."""
    names, columns = _columns(plans)
    made = Table("what", "is a", *(title(facts) for facts in plans))
    for name, source in names.items():
        made.add_row(name, source, *(column.get(name, "") for column in columns))
    return made


def _columns(plans: Sequence[Facts]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Every line's name with its source, and the values of every plan."""
    all_lines = [lines(facts) for facts in plans]
    names: dict[str, str] = {}
    for found in all_lines:
        for line in found:
            names.setdefault(line.name, line.source)
    return names, [{line.name: line.value for line in reversed(found)} for found in all_lines]


def as_json(plans: Sequence[Facts]) -> list[dict]:
    """Facts and estimates apart."""
    found = []
    for facts in plans:
        enough, left = fits(facts)
        said: dict = {"facts": dataclasses.asdict(facts), "fits": enough, "bytes_left": left}
        if facts.compiled.refused is None:
            said["estimates"] = dataclasses.asdict(estimate(facts))
        found.append(said)
    return found


COLOURS = ("#245a8d", "#5b8fbf", "#9db8d0", "#d39b3a", "#b8562f", "#7b6ba8", "#6a9e6a")


def as_html(plans: Sequence[Facts]) -> str:
    """One page: bars of memory by part and of time by bound, and all lines below; nothing is loaded."""
    most = max(find_topology(facts.topology).chip.memory for facts in plans)
    parts = [
        "<!doctype html><meta charset='utf-8'><title>unibiomed plan</title>",
        "<style>body{font:14px sans-serif;margin:2em;max-width:75em}td,th{padding:2px 10px;text-align:left}"
        "tr:nth-child(even){background:#f3f5f7}.bar{height:18px;background:#eef1f4;display:flex}"
        ".bar i{display:block;height:18px}.estimate{color:#8a4b12}small i{padding:0 .6em;margin-right:.3em}"
        "</style><h1>unibiomed plan</h1><p>Brown lines are estimates, the others facts of the compiler, of "
        "the layout or of the program.</p>",
    ]
    for facts in plans:
        parts.append(f"<h2>{html.escape(title(facts))}</h2>")
        chip = find_topology(facts.topology).chip
        if facts.compiled.refused is None:
            compiled = facts.compiled
            memory = {
                **facts.held,
                "kept for the backward pass": compiled.kept,
                "other temporaries": max(0, compiled.temporaries - compiled.kept),
            }
            parts += [f"<p>Memory of a device, {_bytes(chip.memory)} in all</p>", _bar(memory, most)]
            times = estimate(facts)
            named = {name: getattr(times, name) for name in ("compute", "memory", "links", "network")}
            parts.append("<p>Time by bound</p>")
            for number, (name, seconds) in enumerate(named.items()):
                bar = _bar({name: seconds}, times.seconds, COLOURS[number:], _seconds)
                parts.append(bar)
        parts.append("<table>")
        for line in lines(facts):
            kind = " class=estimate" if line.source == ESTIMATE else ""
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
            parts.append(f"<tr{kind}>{cells}</tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _bar(values: dict[str, float], most: float, colours: Sequence[str] = COLOURS, said=_bytes) -> str:
    shown = [
        (name, value, colours[place % len(colours)]) for place, (name, value) in enumerate(values.items())
    ]
    bars = "".join(
        f"<i style='width:{100 * value / most:.2f}%;background:{colour}' title='{html.escape(name)}'></i>"
        for name, value, colour in shown
    )
    key = " ".join(
        f"<i style='background:{colour}'></i>{html.escape(name)} {said(value)}"
        for name, value, colour in shown
    )
    return f"<div class=bar>{bars}</div><small>{key}</small>"
