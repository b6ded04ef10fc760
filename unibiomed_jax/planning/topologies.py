"""Devices that are not here: their names, what they can do, and how programs are compiled for them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from unibiomed_jax.errors import InputError

GIB = 2**30
CLOUD = "Google Cloud, TPU system architecture, page of this version"
BOOK = "How to Scale Your Model (Austin et al. 2025), chapter 2: links and network of a chip"
NVIDIA = "NVIDIA, data sheet of the SXM module, dense, without sparsity; a network card of 400 Gbit/s a GPU"


@dataclass(frozen=True)
class Chip:
    """What one device can do: half a chip where JAX sees two of them on a chip."""

    # How JAX calls it.
    kind: str
    # "tpu" or "gpu".
    platform: str
    # Devices that are rented together as one chip.
    devices_per_chip: int
    # Bytes of the large memory, and bytes a second from and to it.
    memory: float
    bandwidth: float
    # Operations a second in bfloat16, and how many times longer those of float32 at full precision take.
    peak: float
    float32_cost: float
    # Bytes a second that a device sends along a ring of neighbours, both ways together, and to devices of
    # other slices or nodes.
    link: float
    network: float
    # Where these numbers are from.
    sources: tuple[str, ...]

    @property
    def room(self) -> float:
        """Bytes of the memory that a program may have: of a GPU what JAX takes of it, if nobody asks for more
        (XLA_PYTHON_CLIENT_MEM_FRACTION).
        """
        return self.memory * (0.75 if self.platform == "gpu" else 1)


# A TPU multiplies float32 at full precision as six products of bfloat16; an H100 does 67 TFLOP/s in float32.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", "tpu", 1, 32 * GIB, 1228e9, 275e12, 6, 2 * 45e9, 6.25e9, (CLOUD, BOOK)),
    "v5e": Chip("TPU v5 lite", "tpu", 1, 16 * GIB, 819e9, 197e12, 6, 2 * 45e9, 3.125e9, (CLOUD, BOOK)),
    "v5p": Chip("TPU v5", "tpu", 1, 95 * GIB, 2765e9, 459e12, 6, 2 * 90e9, 6.25e9, (CLOUD, BOOK)),
    "v6e": Chip("TPU v6 lite", "tpu", 1, 32 * GIB, 1640e9, 918e12, 6, 2 * 90e9, 12.5e9, (CLOUD, BOOK)),
    "tpu7x": Chip("TPU7x", "tpu", 2, 96 * GIB, 3690e9, 1153.5e12, 6, 2 * 45e9, 6.25e9, (CLOUD, BOOK)),
    "h100": Chip("NVIDIA H100", "gpu", 1, 80e9, 3350e9, 989e12, 14.8, 450e9, 50e9, (NVIDIA,)),
    "h200": Chip("NVIDIA H200", "gpu", 1, 141e9, 4800e9, 989e12, 14.8, 450e9, 50e9, (NVIDIA,)),
}
_NAME = re.compile(r"([a-z0-9]+):(\d+(?:x\d+){0,2})(?:@(\d+))?")


@dataclass(frozen=True)
class Topology:
    """Chips as they are wired."""

    # As the user named it: v5e:4x4, v5e:16x16@2 (two slices), h100:8, h100:4x8 (four nodes).
    name: str
    chip: Chip
    # Chips along every axis of a slice; (nodes, GPUs) of GPUs.
    sizes: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.sizes) * self.slices

    @property
    def devices_in_slice(self) -> int:
        """Devices between which the fast links are: of a slice, or of a node."""
        if self.chip.platform == "gpu":
            return self.sizes[-1]
        return math.prod(self.sizes) * self.chip.devices_per_chip

    def devices(self) -> list[Any]:
        """Its devices, none of which can compute.

        Raises:
            InputError: the compiler is not installed, or knows no such topology.
        """
        return list(_described(self).devices)


def find_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
        InputError: it cannot be read, or names no chip that is known.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if not found:
        raise InputError(
            f"The topology {name!r} cannot be read; write chip and sizes as in v5e:4x4, v5p:2x2x4, "
            "v5e:16x16@2 (two slices) or h100:8."
        )
    if found[1] not in CHIPS:
        near = difflib.get_close_matches(found[1], CHIPS, n=1, cutoff=0)[0]
        raise InputError(
            f"The topology {name!r} names a chip that is not known; the nearest is {near} "
            f"(known: {', '.join(CHIPS)})."
        )
    chip, sizes = CHIPS[found[1]], tuple(int(size) for size in found[2].split("x"))
    slices = int(found[3] or 1)
    if not all(sizes) or not slices or math.prod(sizes) * slices > 16_384:
        raise InputError(f"The topology {name!r} has no chip, or more than 16,384; name another size.")
    if chip.platform == "gpu":
        if len(sizes) > 2 or slices > 1:
            raise InputError(f"The topology {name!r} cannot be read; write nodes and GPUs, as in h100:4x8.")
    elif len(sizes) != (2 if found[1] in ("v5e", "v6e") else 3):
        example = "4x4" if found[1] in ("v5e", "v6e") else "2x2x4"
        raise InputError(f"The topology {name!r} has another number of axes than its chips; as in {example}.")
    return Topology(name.strip().lower(), chip, sizes, slices)


def require_compiler(chip: Chip) -> None:
    """Refuse what no compiler that is installed can do.

    Raises:
        InputError: names the extra that brings it.
    """
    package, extra = ("libtpu", "tpu") if chip.platform == "tpu" else ("jax_plugins.xla_cuda13", "plan-gpu")
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(package) is not None:
            return
    raise InputError(
        f"The compiler for {chip.kind} is not installed; install the extra: pip install "
        f"'unibiomed-jax[{extra}]'."
    )


@functools.cache
def _described(topology: Topology) -> Any:
    from jax.experimental import topologies

    chip = topology.chip
    require_compiler(chip)
    if chip.platform == "gpu":
        nodes, gpus = (1, *topology.sizes)[-2:]
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology.name,
            topology=f"1x{nodes}x{gpus}",
            target_config=_gpu(chip),
        )
    # The compiler asks no server of Google's what it runs on, and several processes may use it.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        TPU_MIN_LOG_LEVEL="3",
        TPU_STDERR_LOG_LEVEL="3",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.sizes) < 4:  # a host with fewer chips than hosts have
        options["chips_per_host_bounds"] = (*topology.sizes, 1)[:3]
    if chip is CHIPS["v4"]:
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    family, _, sizes = topology.name.partition("@")[0].partition(":")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{family}:{sizes}", **options)
    except Exception as error:  # jaxlib's own type, which has no public name in every version
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise InputError(
            f"There is no topology {topology.name!r} ({reason.rstrip('.')}); sizes are multiples of a host's "
            "2x2 chips."
        ) from None


def _gpu(chip: Chip) -> str:
    """What the compiler asks of a GPU: that of compute capability 9.0, as the driver reports it."""
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": 227 << 10,
        "shared_memory_per_core": 228 << 10,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": 50 << 20,
        "clock_rate_ghz": 1.98,
        "device_memory_size": int(chip.memory),
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    numbers = " ".join(f"{name}: {value}" for name, value in info.items())
    return (
        f"gpu_device_info {{ {numbers} cuda_compute_capability {{ major: 9 }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } '
        f'runtime_version {{ major: 13 }} device_description_str: "{chip.kind}"'
    )
