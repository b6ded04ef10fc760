"""What a compiler says about a program, kept on disk so that a second look takes seconds."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.models.attention import recorded_choices
from unibiomed_jax.planning import arithmetic, program_text
from unibiomed_jax.planning.program_text import Collective
from unibiomed_jax.planning.programs import Case, Program, TrainCase, build
from unibiomed_jax.planning.topologies import find_topology
from unibiomed_jax.training.footprint import device_bytes

# What the compiler asks for where it finds no room: "Used 20.50G of 15.75G hbm", or, where temporaries alone
# are too much, "HLO temporaries (310.42G) exceeds available HBM (15.75G)".
_SIZE = r"([\d.]+)([KMGT]?)"
_REFUSED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm|\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Files of this package that make programs.
MADE_OF = (
    *("config", "sharding", "masks", "models", "parameters.py", "training", "inference"),
    "planning/programs.py",
)
# What a new version of this file would read otherwise.
FORMAT = 2


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of the program of one device; bytes, if nothing else is said."""

    arguments: int
    outputs: int
    # Outputs that take the place of arguments.
    aliased: int
    temporaries: int
    peak: int
    # Where it does not fit, what it asks for and what there is; everything else is 0 then.
    refused: tuple[float, float] | None
    collectives: tuple[Collective, ...]
    # Read and written, loops as often as they run.
    traffic: float
    # Of the temporaries, what the forward pass keeps for the backward pass.
    kept: int
    # The largest arrays: bytes, shape, name in the source.
    largest: tuple[tuple[int, str, str], ...]
    # Loops whose length the program does not say.
    unknown_loops: int
    # Of one core, and the most memory of the process.
    seconds: float
    compiler_memory: int


@dataclass(frozen=True)
class Facts:
    """A program and what was found."""

    title: str
    program: str
    topology: str
    strategy: str
    mesh: dict[str, int]
    devices: int
    chips: int
    # Samples, or answers, of all devices; tokens said.
    samples: int
    said: int
    # Bytes of a device by part, from where arrays lie.
    held: dict[str, int]
    # Of them, what the program does not read and that lies there all the same.
    idle: int
    # Operations of all devices by what is multiplied; those that the result needs (0: not counted).
    operations: dict[str, float]
    useful: float
    # Bytes that a token cannot but read, of all devices together.
    every_token: int
    # How often loops of unknown length are taken to run.
    trips: int
    compiled: Compiled
    # Versions of what made it.
    made_by: dict[str, str]
    # By part of the model, what computes its attentions.
    attention: dict[str, str] = dataclasses.field(default_factory=dict)


def look(case: Case, folder: Path, *, of_any_code: bool = False) -> Facts | None:
    """The facts of a case that were found before; None: not yet, or by other code or versions."""
    path = folder / f"{_case_key(case)}.json"
    found = read(path) if path.is_file() else None
    return found if found is None or of_any_code or found.made_by == made_by() else None


def find(case: Case, folder: Path) -> Facts:
    """Compile a case, or take what was found before, and keep it in a folder.

    The compiled program is known by the text that goes into the compiler: after a change of the code that
    changes no program, nothing is compiled again.

    Raises:
        InputError: the case cannot be.
    """
    found = look(case, folder)
    if found is not None:
        return found
    topology = find_topology(case.topology)
    program = build(case)
    with recorded_choices() as choices:
        traced = program.function.trace(*program.arguments, **program.static)
    counted = arithmetic.operations(traced.jaxpr, program.trips)
    platform = "cuda" if topology.chip.platform == "gpu" else topology.chip.platform
    lowered = traced.lower(lowering_platforms=(platform,))
    # Names of places in the source do not change a program.
    source = f"{FORMAT} {case.topology} {program.trips} {json.dumps(compilers())} {lowered.as_text()}"
    kept = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.compiled.json"
    folder.mkdir(parents=True, exist_ok=True)
    if kept.is_file():
        compiled = _read_compiled(json.loads(kept.read_text()))
    else:
        compiled, text = compile_program(lowered, program)
        if text:
            with gzip.open(kept.with_suffix(".hlo.gz"), "wt", 3) as file:
                file.write(text)
        _write(kept, dataclasses.asdict(compiled))
    facts = Facts(
        title=case.title,
        program="update" if isinstance(case, TrainCase) else case.program,
        topology=case.topology,
        strategy=case.config.strategy if isinstance(case, TrainCase) else case.strategy,
        mesh=dict(program.layout.mesh.shape),
        devices=program.layout.mesh.size,
        chips=topology.chips,
        samples=program.samples,
        said=program.said,
        held={part: device_bytes(tree) for part, tree in program.held.items()},
        idle=idle_bytes(traced.jaxpr, program),
        operations={arithmetic.text(kind): count for kind, count in counted.items()},
        useful=program.useful,
        every_token=program.every_token,
        trips=program.trips,
        compiled=compiled,
        made_by=made_by(),
        attention={
            tower: ", ".join(dict.fromkeys(one.implementation for one in choices if one.tower == tower))
            for tower in dict.fromkeys(one.tower for one in choices)
        },
    )
    _write(folder / f"{_case_key(case)}.json", dataclasses.asdict(facts))
    return facts


def idle_bytes(jaxpr: ClosedJaxpr, program: Program) -> int:
    """Bytes of a device's arguments that no result of a program depends on: they are left out of it."""
    inside = jaxpr.jaxpr
    needed = {id(variable) for variable in inside.outvars}
    for equation in reversed(inside.eqns):
        if equation.effects or any(id(variable) in needed for variable in equation.outvars):
            needed |= {id(variable) for variable in equation.invars}
    leaves = zip(jax.tree.leaves(program.arguments), inside.invars, strict=True)
    return device_bytes([leaf for leaf, variable in leaves if id(variable) not in needed and leaf.sharding])


def compile_program(lowered: Any, program: Program) -> tuple[Compiled, str]:
    """What the compiler says, and the text of the compiled program ("" where it does not fit)."""
    started = time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or refused is None:
            raise
        said = [part for part in refused.groups() if part is not None]
        asked, there = (float(said[i]) * _UNITS[said[i + 1]] for i in (0, 2))
        seconds, memory = time.process_time() - started, _most_memory()
        return Compiled(0, 0, 0, 0, 0, (asked, there), (), 0.0, 0, (), 0, seconds, memory), ""
    seconds = time.process_time() - started
    memory, text = executable.memory_analysis(), executable.as_text()
    parsed = program_text.parse(text, program.trips)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    at_once = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=getattr(memory, "peak_memory_in_bytes", 0) or at_once,
        refused=None,
        collectives=tuple(program_text.collectives(parsed, program.layout.mesh.shape)),
        traffic=program_text.traffic(parsed),
        kept=program_text.kept_for_backward(parsed),
        largest=tuple(program_text.largest(parsed)),
        unknown_loops=parsed.unknown_loops,
        seconds=seconds,
        compiler_memory=_most_memory(),
    ), text


@functools.cache
def made_by() -> dict[str, str]:
    """Versions of the compilers, and a hash of the code on which programs depend."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for place in MADE_OF:
        for path in sorted((package / place).rglob("*.py")) or [package / place]:
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return {"code": digest.hexdigest()[:12], **compilers()}


def compilers() -> dict[str, str]:
    """Versions of what compiles."""
    found = {"jax": jax.__version__}
    for package in ("libtpu", "jax-cuda13-pjrt"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> Facts:
    """Facts that were kept."""
    values = json.loads(path.read_text())
    return Facts(**values | {"compiled": _read_compiled(values["compiled"])})


def _read_compiled(values: dict) -> Compiled:
    rows = tuple(Collective(row[0], tuple(row[1]), *row[2:]) for row in values["collectives"])
    refused = values["refused"]
    largest = tuple(map(tuple, values["largest"]))
    return Compiled(
        **values | {"collectives": rows, "refused": refused and tuple(refused), "largest": largest}
    )


def _case_key(case: Case) -> str:
    said = [FORMAT, type(case).__name__, to_dict(case)]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _write(path: Path, values: dict) -> None:
    """As a whole or not at all: several processes write here."""
    partial = path.with_suffix(f".{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}.partial")
    partial.write_text(json.dumps(values))
    partial.replace(path)


def _most_memory() -> int:
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
