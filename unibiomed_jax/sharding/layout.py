"""Where arrays lie: a mesh of devices and the strategy that divides parameters and batches over it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.sharding.axes import FUSED, MEANINGS, axis_units, logical_axes
from unibiomed_jax.sharding.strategies import DATA_PARALLEL, Strategy


class AxisLayout(NamedTuple):
    """How one axis of a parameter is divided."""

    # Mesh axes that divide it; none: it is whole on every device.
    mesh_axes: tuple[str, ...]
    # Why it is whole although the strategy divides axes of its meaning.
    obstacle: str | None


class ParameterLayout(NamedTuple):
    """What `Layout.explain` says about one parameter."""

    path: str
    shape: tuple[int, ...]
    meanings: tuple[str | None, ...]
    spec: PartitionSpec
    bytes_per_device: int
    # A sentence for every axis that the strategy divides and this parameter cannot.
    obstacles: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh with a strategy over it: made once, and handed to whatever places or compiles arrays."""

    mesh: Mesh | AbstractMesh
    strategy: Strategy
    # Numbers along an axis that may not be parted, by its meaning; 1 where nothing is said.
    units: Mapping[str, int]

    def __post_init__(self):
        """Raise InputError for a strategy that does not fit the mesh, or names what no parameter has."""
        for meaning, axes in self.strategy.items():
            if meaning not in MEANINGS:
                raise InputError(
                    f"The strategy divides {meaning!r}, which is no meaning of an axis; choose from "
                    f"{', '.join(sorted(MEANINGS))}."
                )
            for axis in (axes,) if isinstance(axes, str) else axes:
                if axis not in self.mesh.axis_names:
                    raise InputError(
                        f"The strategy divides {meaning!r} over {axis!r}, but the mesh has the axes "
                        f"{', '.join(self.mesh.axis_names)}; give it that axis, or choose one of them."
                    )

    @classmethod
    def over(
        cls,
        devices: Sequence[jax.Device] | None = None,
        strategy: Strategy = DATA_PARALLEL,
        model: ModelConfig | None = None,
    ) -> Layout:
        """A strategy over devices in one row named "data"; by default all devices of all hosts."""
        mesh = Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))
        return cls(mesh, strategy, {} if model is None else axis_units(model))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Trace what is inside for the devices of this layout (see `sharding.target`)."""
        mesh = self.mesh.abstract_mesh if isinstance(self.mesh, Mesh) else self.mesh
        with jax.sharding.use_abstract_mesh(mesh):
            yield

    def jit(self, function: Callable, **options) -> Any:
        """`jax.jit` of a function for this layout."""

        @functools.wraps(function)
        def inside(*arguments, **named):
            with self.inside():
                return function(*arguments, **named)

        return jax.jit(inside, **options)

    # -------------------------------------------------------------------------------------------- parameters

    def axes(self, path: str, shape: Sequence[int]) -> list[AxisLayout]:
        """How every axis of the parameter at a dotted path is divided; a mesh axis divides an array once."""
        result: list[AxisLayout] = []
        used: set[str] = set()
        for size, meaning in zip(shape, logical_axes(path, len(shape)), strict=True):
            wanted = self.strategy.get(meaning, ()) if meaning else ()
            wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
            free = tuple(axis for axis in wanted if axis not in used)
            obstacle = self._obstacle(meaning, size, free) if free else None
            result.append(AxisLayout(() if obstacle else free, obstacle))
            used.update(result[-1].mesh_axes)
        return result

    def _obstacle(self, meaning: str, size: int, mesh_axes: tuple[str, ...]) -> str | None:
        parts = math.prod(self.mesh.shape[axis] for axis in mesh_axes)
        if parts == 1:
            return None
        if meaning in FUSED:
            return f"its {meaning} axis holds {FUSED[meaning]} side by side"
        unit = self.units.get(meaning, 1)
        if size % (unit * parts):
            whole = f"{size // unit} units of {unit}" if unit > 1 else f"{size} numbers"
            return f"its {meaning} axis of {whole} does not divide by {parts}"
        return None

    def spec(self, path: str, shape: Sequence[int]) -> PartitionSpec:
        """Which mesh axes divide which axis of the parameter at a dotted path."""
        found = (axis.mesh_axes for axis in self.axes(path, shape))
        return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in found))

    def parameter(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """Where the parameter at a dotted path lies."""
        return NamedSharding(self.mesh, self.spec(path, shape))

    def tree(self, tree: Any) -> Any:
        """Where every array of a tree that holds tables of parameters lies.

        A leaf below a parameter's path (the parameter itself, its gradient, its optimiser moments) lies as
        that parameter; everything else is whole on every device.
        """

        def place(keys, leaf):
            names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
            # Every parameter lies inside a module, so its path has a dot; other names are not paths.
            path = next((name for name in reversed(names) if "." in name), None)
            return self.parameter(path, leaf.shape) if path else NamedSharding(self.mesh, PartitionSpec())

        return jax.tree_util.tree_map_with_path(place, tree)

    def place(self, tree: Any) -> Any:
        """Put parameters or a state on the devices."""
        return jax.device_put(tree, self.tree(tree))

    def pin(self, tree: Any) -> Any:
        """Inside a compiled function: keep parameters or a state where they lie."""
        return jax.lax.with_sharding_constraint(tree, self.tree(tree))

    def abstract(self, tree: Any) -> Any:
        """A tree of abstract arrays, with where they lie."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            self.tree(tree),
        )

    def explain(self, parameters: Mapping[str, Any]) -> list[ParameterLayout]:
        """Where every parameter lies and what it costs a device, the most expensive first."""
        rows = []
        for path, value in parameters.items():
            spec, shape = self.spec(path, value.shape), tuple(value.shape)
            size = math.prod(NamedSharding(self.mesh, spec).shard_shape(shape)) * value.dtype.itemsize
            obstacles = tuple(axis.obstacle for axis in self.axes(path, shape) if axis.obstacle)
            rows.append(ParameterLayout(path, shape, logical_axes(path, len(shape)), spec, size, obstacles))
        return sorted(rows, key=lambda row: -row.bytes_per_device)

    # ----------------------------------------------------------------------------------------------- batches

    @property
    def batch(self) -> NamedSharding:
        """Batches are divided along their first axis, if the strategy divides them."""
        return NamedSharding(self.mesh, PartitionSpec(self.strategy.get("batch")))

    def place_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's share of a batch as global arrays."""
        return {
            name: jax.make_array_from_process_local_data(self.batch, value) for name, value in batch.items()
        }

    def require_divisible(self, batch_size: int) -> None:
        """Refuse a batch that the devices cannot share evenly.

        Raises:
            InputError: names both numbers.
        """
        axes = self.strategy.get("batch", ())
        devices = math.prod(self.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
        if batch_size % devices:
            raise InputError(
                f"A batch of {batch_size} samples cannot be split over {devices} devices: "
                f"choose a multiple of {devices}."
            )
