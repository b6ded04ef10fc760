"""What a program that is being traced is compiled for; the process that traces it has no say."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Target(NamedTuple):
    """Kind and number of the devices that will run a program together."""

    # "cpu", "gpu" or "tpu"; None where the program does not say.
    platform: str | None
    devices: int


def target() -> Target:
    """The target of what is being traced: the mesh in force (`Layout.inside`), else one unnamed device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Target(None, 1)
    return Target(mesh.abstract_device.platform if mesh.abstract_device else None, mesh.size)
