"""How long a program takes at best: the largest of what arithmetic, memory and links need by themselves.

All of it is an estimate: peaks of data sheets, everything overlapping perfectly. A real step is slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from unibiomed_jax.planning.facts import Facts
from unibiomed_jax.planning.program_text import Collective
from unibiomed_jax.planning.topologies import Topology, find_topology

# The paper's run: updates, and samples of each.
UPDATES, SAMPLES = 100_000, 128


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program, and what follows from them."""

    compute: float
    memory: float
    # Between neighbours, and between slices or nodes.
    links: float
    network: float
    # The largest of them, and its name.
    seconds: float
    bound: str
    # Useful operations over what the devices could do in that time; None where they are not counted.
    mfu: float | None
    samples_per_second: float
    tokens_per_second: float
    # Of the paper's run, if this is an update.
    days: float | None
    chip_hours: float | None
    # Of a loop over tokens on one device: bytes that a token reads over those that it cannot but read.
    reads_per_token: float | None


def estimate(facts: Facts) -> Estimate:
    """The roofline of a program that fits."""
    topology = find_topology(facts.topology)
    chip = topology.chip
    weighted = sum(
        count * (chip.float32_cost if kind.startswith("float32 at") else 1.0)
        for kind, count in facts.operations.items()
    )
    links = network = 0.0
    for one in facts.compiled.collectives:
        near, far = exchange_seconds(one, facts.mesh, topology)
        links, network = links + near, network + far
    parts = {
        "compute": weighted / facts.devices / chip.peak,
        "memory": facts.compiled.traffic / chip.bandwidth,
        "links": links,
        "network": network,
    }
    bound = max(parts, key=lambda name: parts[name])
    seconds = max(parts[bound], 1e-12)
    rate = facts.samples / seconds
    days = UPDATES * SAMPLES / rate / 86_400 if facts.program == "update" else None
    reads = None
    if facts.program == "advance" and facts.devices == 1:
        reads = facts.compiled.traffic / (facts.said / facts.samples) / facts.every_token
    return Estimate(
        **parts,
        seconds=seconds,
        bound=bound,
        mfu=facts.useful / facts.devices / chip.peak / seconds if facts.useful else None,
        samples_per_second=rate,
        tokens_per_second=facts.said / seconds,
        days=days,
        chip_hours=None if days is None else days * 24 * facts.chips,
        reads_per_token=reads,
    )


def exchange_seconds(one: Collective, mesh: dict[str, int], topology: Topology) -> tuple[float, float]:
    """Seconds on the links between neighbours and on the network between slices.

    Rings: a device passes on all but its own part of what is gathered, a sum goes around twice. Of a group
    that spans slices, those of a slice gather or sum first, and each then exchanges its part with the others.
    """
    across = slices_of_group(one, mesh, topology)
    inside = max(1, one.group // across)
    near = one.bytes * _passes(one.kind, inside) / topology.chip.link if inside > 1 else 0.0
    far = one.bytes / inside * _passes(one.kind, across) / topology.chip.network if across > 1 else 0.0
    return near, far


def _passes(kind: str, devices: int) -> float:
    """How often what is exchanged passes a device."""
    if kind == "collective-permute":
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (devices - 1) / devices


def slices_of_group(one: Collective, mesh: dict[str, int], topology: Topology) -> int:
    """Over how many slices, or nodes, the devices of a group are spread."""
    sizes = tuple(mesh.values())
    chosen = [place for place, axis in enumerate(mesh) if axis in one.axes]
    if not chosen:
        return 1
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    others = tuple(0 for _ in range(len(sizes) - len(chosen)))
    group = np.moveaxis(devices, chosen, range(-len(chosen), 0))[others].ravel()
    return len(np.unique(group // topology.devices_in_slice))
