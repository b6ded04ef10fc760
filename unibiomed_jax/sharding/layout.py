"""Where arrays lie: a mesh of devices and the strategy that divides parameters and activations over it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.sharding.axes import (
    COMPUTED,
    LOGICAL_AXES,
    MEANINGS,
    OPTIMIZER,
    SAMPLES,
    WEIGHTS,
    axis_units,
    logical_axes,
    tower_of,
)
from unibiomed_jax.sharding.strategies import DATA_PARALLEL, HSDP, MESH_AXES, Strategy, mesh_axes_of

# How a parameter lies: as it is used, as it is kept between uses, or as the optimiser keeps it.
Use = Literal["computed", "weights", "optimizer"]

# Bytes that a strategy divides and that stay whole all the same, as a share of all: above it a strategy that
# should save memory does not.
MOST_WHOLE = 0.05

# Meanings that a mesh axis must divide, since a strategy is chosen for them; keys and values of few heads are
# copied on purpose, so that every device has those of its queries.
MUST_DIVIDE = tuple(meaning for meaning in COMPUTED if meaning != "kv_heads")


class ParameterLayout(NamedTuple):
    """What `Layout.explain` says about one parameter."""

    path: str
    shape: tuple[int, ...]
    meanings: tuple[str | None, ...]
    spec: PartitionSpec
    bytes_per_device: int
    # A sentence for what the strategy divides and this parameter cannot.
    obstacles: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh with a strategy over it: made once, and handed to whatever places or compiles arrays."""

    mesh: Mesh | AbstractMesh
    strategy: Strategy
    # Numbers along an axis that may not be parted, by tower and meaning; 1 where nothing is said.
    units: Mapping[str, int]

    def __post_init__(self):
        """Raise InputError for a strategy that does not fit the mesh, or says what cannot be."""
        for meaning, axes in self.strategy.items():
            if meaning.rpartition(".")[2] not in MEANINGS:
                raise InputError(
                    f"The strategy divides {meaning!r}, which is no meaning of an axis; choose from "
                    f"{', '.join(sorted(MEANINGS))}."
                )
            for axis in axes_of(axes):
                if axis not in self.mesh.axis_names:
                    raise InputError(
                        f"The strategy divides {meaning!r} over {axis!r}, but the mesh has the axes "
                        f"{', '.join(self.mesh.axis_names)}; give it that axis, or choose one of them."
                    )
        for pattern, meanings in LOGICAL_AXES:
            used: dict[str, str] = {}
            for meaning in filter(None, meanings):
                for axis in self._mesh_axes(meaning, tower_of(pattern)) if meaning in COMPUTED else ():
                    if axis in used:
                        raise InputError(
                            f"The strategy divides {used[axis]!r} and {meaning!r} of {pattern} both over "
                            f"{axis!r}; a mesh axis divides an array once, so choose another for one of them."
                        )
                    used[axis] = meaning
        named = mesh_axes_of(self.strategy)
        for axis, size in self.mesh.shape.items():
            if size > 1 and axis not in named:
                raise InputError(
                    f"The mesh has {axis}={size}, but the strategy divides nothing over {axis!r}; leave "
                    f"it out, or choose from {', '.join(named)}."
                )

    @classmethod
    def over(
        cls,
        devices: Sequence[jax.Device] | None = None,
        strategy: Strategy = DATA_PARALLEL,
        model: ModelConfig | None = None,
        mesh: Mapping[str, int] | None = None,
    ) -> Layout:
        """A strategy over devices, by default all of all hosts.

        Args:
            devices: in the order of the mesh, its last axis fastest.
            strategy: a table of `strategies`.
            model: whose heads are not to be parted.
            mesh: devices along each mesh axis; by default all along the one axis that the strategy names.

        Raises:
            InputError: the mesh has another number of devices, or the strategy does not fit it.
        """
        if devices is None:  # those of a process side by side, and those of a slice
            devices = sorted(jax.devices(), key=lambda device: device.process_index)
        devices = np.asarray(devices)
        sizes = mesh_sizes(mesh, strategy, devices.size)
        mesh = Mesh(devices.reshape([*sizes.values()]), tuple(sizes))
        return cls(mesh, strategy, {} if model is None else axis_units(model))

    @classmethod
    def abstractly(cls, strategy: Strategy, model: ModelConfig, mesh: Mapping[str, int]) -> Layout:
        """A layout over devices that need not exist: says where arrays would lie."""
        sizes = mesh_sizes(mesh, strategy, math.prod(mesh.values()))
        types = (AxisType.Auto,) * len(sizes)
        return cls(AbstractMesh((*sizes.values(),), (*sizes,), axis_types=types), strategy, axis_units(model))

    @property
    def platform(self) -> str:
        """Kind of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Trace what is inside for this layout: `target` and `constrain` obey it."""
        mesh = self.mesh.abstract_mesh if isinstance(self.mesh, Mesh) else self.mesh
        before = _in_force.set(self)
        try:
            with jax.sharding.use_abstract_mesh(mesh):
                yield
        finally:
            _in_force.reset(before)

    def jit(self, function: Callable, **options) -> Any:
        """`jax.jit` of a function for this layout."""

        @functools.wraps(function)
        def inside(*arguments, **named):
            with self.inside():
                return function(*arguments, **named)

        return jax.jit(inside, **options)

    def _mesh_axes(self, meaning: str, tower: str = "") -> tuple[str, ...]:
        """The mesh axes that divide a meaning, in a tower."""
        for name in (f"{tower}.{meaning}", meaning):
            if name in self.strategy:
                return axes_of(self.strategy[name])
        other = WEIGHTS if meaning == OPTIMIZER else "batch" if meaning in SAMPLES else meaning
        return () if other == meaning else self._mesh_axes(other, tower)

    def parts(self, mesh_axes: Sequence[str]) -> int:
        """In how many parts the mesh axes divide together."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)

    # -------------------------------------------------------------------------------------------- parameters

    def spec(self, path: str, shape: Sequence[int], use: Use = WEIGHTS) -> PartitionSpec:
        """Which mesh axes divide which axis of the parameter at a dotted path."""
        return self._divided(path, tuple(shape), use)[0]

    def _divided(self, path: str, shape: tuple[int, ...], use: Use) -> tuple[PartitionSpec, list[str]]:
        """The division of a parameter, and what stands in the way of more."""
        meanings, obstacles = logical_axes(path, len(shape)), []
        divided: list[tuple[str, ...]] = [()] * len(shape)
        for place, (size, meaning) in enumerate(zip(shape, meanings, strict=True)):
            wanted = self._mesh_axes(meaning, tower_of(path)) if meaning in COMPUTED else ()
            unit = self.units.get(f"{tower_of(path)}.{meaning}", 1)
            divided[place] = self._dividing(size // unit, wanted)
            if self.parts(divided[place]) < self.parts(wanted):
                whole = f"{size // unit} {meaning}" if unit > 1 else f"{meaning} axis of {size}"
                obstacles.append(f"its {whole} do not divide by {self.parts(wanted)}")
        if use == "computed":
            return _spec(divided), obstacles

        taken = {axis for axes in divided for axis in axes}
        wanted = tuple(axis for axis in self._mesh_axes(use, tower_of(path)) if axis not in taken)
        # Vectors stay whole, as gathering them costs more than they do; a layer is not cut out of its stack.
        matrix = [place for place, meaning in enumerate(meanings) if meaning != "layer"]
        local = {place: shape[place] // self.parts(divided[place]) for place in matrix}
        places = sorted(matrix, key=lambda place: -local[place]) if len(matrix) > 1 else []
        best: tuple[str, ...] = ()
        for place in places:
            axes = self._dividing(local[place], wanted)
            if self.parts(axes) > self.parts(best):
                best, where = axes, place
        if best:
            divided[where] += best
        if places and self.parts(best) < self.parts(wanted):
            sizes = "x".join(str(local[place]) for place in matrix)
            obstacles.append(f"no axis of {sizes} divides by {self.parts(wanted)}")
        return _spec(divided), obstacles

    def _dividing(self, size: int, mesh_axes: Sequence[str]) -> tuple[str, ...]:
        """As many of the mesh axes, from the left, as divide so many units."""
        taken = tuple(axis for axis in mesh_axes if self.mesh.shape[axis] > 1)
        while taken and size % self.parts(taken):
            taken = taken[:-1]
        return taken

    def parameter(self, path: str, shape: Sequence[int], use: Use = WEIGHTS) -> NamedSharding:
        """Where the parameter at a dotted path lies."""
        return NamedSharding(self.mesh, self.spec(path, shape, use))

    def tree(self, tree: Any, use: Use = WEIGHTS) -> Any:
        """Where every array of a tree that holds tables of parameters lies.

        A leaf below a parameter's path (the parameter itself, its gradient, its optimiser moments) lies as
        that parameter; everything else is whole on every device.
        """

        def place(keys, leaf):
            names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
            # Every parameter lies inside a module, so its path has a dot; other names are not paths.
            path = next((name for name in reversed(names) if "." in str(name)), None)
            return (
                self.parameter(path, leaf.shape, use) if path else NamedSharding(self.mesh, PartitionSpec())
            )

        return jax.tree_util.tree_map_with_path(place, tree)

    def place(self, tree: Any, use: Use = WEIGHTS) -> Any:
        """Put parameters or a state on the devices."""
        return jax.device_put(tree, self.tree(tree, use))

    def pin(self, tree: Any, use: Use = WEIGHTS) -> Any:
        """Inside a compiled function: keep parameters or a state where they lie."""
        return jax.lax.with_sharding_constraint(tree, self.tree(tree, use))

    def abstract(self, tree: Any, use: Use = WEIGHTS) -> Any:
        """A tree of abstract arrays, with where they lie."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            self.tree(tree, use),
        )

    def move(self, path: str, value: jax.Array, was: Use, becomes: Use) -> jax.Array:
        """A parameter from one use to another; its gradient goes the way back, summed into shares."""
        if self.mesh.size == 1:
            return value
        start, end = (self.parameter(path, value.shape, use) for use in (was, becomes))
        return _moved(value, start, end)

    @property
    def gathers(self) -> bool:
        """Whether weights are kept in shares that a layer gathers when it needs them."""
        return any(
            self.parts(self._mesh_axes(WEIGHTS, tower)) > 1 for tower in ("vision", "language", "sam2")
        )

    def explain(self, parameters: Mapping[str, Any], use: Use = WEIGHTS) -> list[ParameterLayout]:
        """Where every parameter lies and what it costs a device, the most expensive first."""
        rows = []
        for path, value in parameters.items():
            shape = tuple(value.shape)
            spec, obstacles = self._divided(path, shape, use)
            size = math.prod(NamedSharding(self.mesh, spec).shard_shape(shape)) * value.dtype.itemsize
            meanings = logical_axes(path, len(shape))
            rows.append(ParameterLayout(path, shape, meanings, spec, size, tuple(obstacles)))
        return sorted(rows, key=lambda row: -row.bytes_per_device)

    def require_useful(self, parameters: Mapping[str, Any], use: Use = WEIGHTS) -> None:
        """Refuse a mesh on which the strategy does not do what it is for.

        Args:
            parameters: by dotted path; shapes and number formats are enough.

        Raises:
            InputError: heads or channels that do not divide, or too many bytes that stay whole.
        """
        for path, value in parameters.items():
            for size, meaning in zip(value.shape, logical_axes(path, len(value.shape)), strict=True):
                axes = self._mesh_axes(meaning, tower_of(path)) if meaning in MUST_DIVIDE else ()
                count = size // self.units.get(f"{tower_of(path)}.{meaning}", 1)
                if count % self.parts(axes):
                    raise InputError(
                        f"The {count} {meaning} of {path} do not divide by the {self.parts(axes)} devices "
                        f"along {', '.join(axes)}; the nearest that does is "
                        f"{math.gcd(count, self.parts(axes))}."
                    )
        whole, total = self._whole(parameters, use)
        if whole > MOST_WHOLE * total:
            parts = self.parts(self._mesh_axes(use))
            fewer = parts
            while whole > MOST_WHOLE * total and fewer > 1:
                fewer //= 2
                sizes = {"replica": parts // fewer, "fsdp": fewer, "tensor": 1, "sequence": 1}
                other = Layout(AbstractMesh((*sizes.values(),), (*sizes,)), HSDP, self.units)
                whole, total = other._whole(parameters, WEIGHTS)
            whole, total = self._whole(parameters, use)
            raise InputError(
                f"{whole / 2**20:,.0f} MiB of {total / 2**20:,.0f} stay whole on every device, because no "
                f"axis of these parameters divides by {parts}; make fewer shares of them, for example "
                f"--strategy hsdp --mesh replica={self.mesh.size // fewer},fsdp={fewer}."
            )

    def _whole(self, parameters: Mapping[str, Any], use: Use) -> tuple[float, int]:
        """Bytes a device holds beyond its share, and bytes of all parameters."""
        beyond, total = 0.0, 0
        for path, value in parameters.items():
            shape = tuple(value.shape)
            here, used = (
                math.prod(self.parameter(path, shape, as_).shard_shape(shape)) for as_ in (use, "computed")
            )
            share = used / self.parts(self._mesh_axes(use, tower_of(path)))
            beyond += max(0.0, here - share) * value.dtype.itemsize
            total += math.prod(shape) * value.dtype.itemsize
        return beyond, total

    # ------------------------------------------------------------------------------------------- activations

    def activation(self, shape: Sequence[int], meanings: Sequence[str | None]) -> PartitionSpec:
        """Which mesh axes divide which axis of an activation.

        Args:
            shape: of the whole array.
            meanings: of its axes, with or without a tower ("language.heads"); None: whole.

        Raises:
            InputError: the strategy divides two of the axes over one mesh axis.
        """
        divided, taken = [], set()
        for size, name in zip(shape, meanings, strict=True):
            tower, _, meaning = (name or "").rpartition(".")
            axes = self._dividing(size, self._mesh_axes(meaning, tower)) if meaning else ()
            if taken.intersection(axes):
                raise InputError(
                    f"The strategy divides two axes of an activation ({', '.join(filter(None, meanings))}) "
                    f"over {', '.join(taken.intersection(axes))}; a mesh axis divides an array once."
                )
            taken.update(axes)
            divided.append(axes)
        return _spec(divided)

    @property
    def batch(self) -> NamedSharding:
        """Batches are divided along their first axis, if the strategy divides them."""
        return NamedSharding(self.mesh, _spec([self._mesh_axes("batch")]))

    @property
    def batch_shares(self) -> int:
        """In how many shares a batch is divided."""
        return self.parts(self._mesh_axes("batch"))

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
        devices = self.batch_shares
        if batch_size % devices:
            raise InputError(
                f"A batch of {batch_size} samples cannot be split over {devices} devices: "
                f"choose a multiple of {devices}."
            )


_in_force: ContextVar[Layout | None] = ContextVar("layout", default=None)


def layout_in_force() -> Layout | None:
    """The layout of what is being traced (`Layout.inside`); None where it has none or a single device."""
    layout = _in_force.get()
    return None if layout is None or layout.mesh.size == 1 else layout


def parse_mesh(text: str) -> dict[str, int]:
    """The mesh that "fsdp=4,tensor=2" says.

    Raises:
        InputError: it is no such list, or names what is no mesh axis.
    """
    sizes = {}
    for item in text.split(","):
        axis, _, size = item.strip().partition("=")
        if axis not in MESH_AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"The mesh {text!r} cannot be read at {item.strip()!r}; write each axis once with its "
                f"devices, as in fsdp=4,tensor=2 (axes: {', '.join(MESH_AXES)})."
            )
        sizes[axis] = int(size)
    return sizes


def mesh_sizes(mesh: Mapping[str, int] | None, strategy: Strategy, devices: int) -> dict[str, int]:
    """Devices along every axis of the mesh.

    Raises:
        InputError: they are more or fewer than there are, or it is not said how they are spread.
    """
    named = mesh_axes_of(strategy)
    if mesh is None:
        if devices > 1 and len(named) != 1:
            example = ",".join(f"{axis}={size}" for axis, size in spread(named, devices).items())
            raise InputError(
                f"The strategy divides over {' and '.join(named)}: say how the {devices} devices are spread, "
                f"for example --mesh {example}."
            )
        mesh = {named[0]: devices}
    if math.prod(mesh.values()) != devices:
        asked = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        fits = ",".join(f"{axis}={size}" for axis, size in spread([*mesh], devices).items())
        raise InputError(
            f"The mesh {asked} has {math.prod(mesh.values())} devices, but there are {devices}; for example "
            f"{fits} fits."
        )
    return {axis: mesh.get(axis, 1) for axis in MESH_AXES}


def spread(axes: Sequence[str], devices: int) -> dict[str, int]:
    """All devices, two along every axis but one."""
    sizes = dict.fromkeys(axes, 1)
    main = "fsdp" if "fsdp" in sizes else next(iter(sizes))
    for axis in sizes:
        if axis != main and devices % 2 == 0:
            sizes[axis], devices = 2, devices // 2
    sizes[main] = devices
    return sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(value: jax.Array, start: NamedSharding, end: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, end)


_moved.defvjp(
    lambda value, start, end: (_moved(value, start, end), None),
    lambda start, end, _, gradient: (jax.lax.with_sharding_constraint(gradient, start),),
)


def axes_of(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of a strategy or a PartitionSpec."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _spec(divided: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in divided))
