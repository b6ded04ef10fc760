"""What the program being traced is compiled for: a property of the program, never of the process that traces."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Target(NamedTuple):
    """Kind and number of the devices that will run a program together."""

    # "cpu", "gpu" or "tpu"; None where the program does not say.
    platform: str | None
    devices: int


def target() -> Target:
    """The target of what is being traced: the mesh in force (see `Layout.inside`), else one unnamed device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Target(None, 1)
    return Target(mesh.abstract_device.platform if mesh.abstract_device else None, mesh.size)
