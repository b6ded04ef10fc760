"""How parameters and batches are laid out over devices.

What an axis of a parameter *means* is said once, in `LOGICAL_AXES`. A strategy is a small table from such a
meaning to an axis of the device mesh; an axis it does not name is kept whole on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unibiomed_jax.errors import InputError

Strategy = Mapping[str, str]

# Path pattern -> meaning of the trailing axes; the first row that fits counts. A stack of layers has one more
# axis in front, "layer". None: an axis that is never split.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # InternViT and the projector
    ("vision_model.patch_embedding.kernel", (None, None, None, "vision")),
    ("vision_model.position_embedding", (None, "vision")),
    ("vision_model.*.attn.qkv.kernel", ("vision", "vision_heads")),
    ("vision_model.*.attn.qkv.bias", ("vision_heads",)),
    ("vision_model.*.attn.proj.kernel", ("vision_heads", "vision")),
    ("vision_model.*.mlp.fc1.kernel", ("vision", "vision_mlp")),
    ("vision_model.*.mlp.fc1.bias", ("vision_mlp",)),
    ("vision_model.*.mlp.fc2.kernel", ("vision_mlp", "vision")),
    ("vision_model.*", (None,)),
    ("mlp1.norm.*", (None,)),
    ("mlp1.linear1.kernel", ("folded", "embed")),
    ("mlp1.linear2.kernel", ("embed", None)),
    ("mlp1.*.bias", (None,)),
    # the language model
    ("language_model.embed_tokens", ("vocab", "embed")),
    ("language_model.lm_head.kernel", ("embed", "vocab")),
    ("language_model.*.q_proj.kernel", ("embed", "heads")),
    ("language_model.*.q_proj.bias", ("heads",)),
    ("language_model.*.[kv]_proj.kernel", ("embed", "kv_heads")),
    ("language_model.*.[kv]_proj.bias", ("kv_heads",)),
    ("language_model.*.o_proj.kernel", ("heads", "embed")),
    ("language_model.*.gate_proj.kernel", ("embed", "mlp")),
    ("language_model.*.up_proj.kernel", ("embed", "mlp")),
    ("language_model.*.down_proj.kernel", ("mlp", "embed")),
    ("language_model.*norm.scale", (None,)),
    ("text_hidden_fcs.linear1.kernel", ("embed", None)),
    ("text_hidden_fcs.linear2.kernel", ("embed", None)),
    ("text_hidden_fcs.*.bias", (None,)),
    # SAM2's trunk
    ("sam2.image_encoder.trunk.patch_embed.kernel", (None, None, None, "trunk")),
    ("sam2.image_encoder.trunk.pos_embed*", (None, None, "trunk")),
    ("sam2.image_encoder.trunk.*.attn.qkv.kernel", ("trunk", "trunk_heads")),
    ("sam2.image_encoder.trunk.*.attn.qkv.bias", ("trunk_heads",)),
    ("sam2.image_encoder.trunk.*.attn.proj.kernel", ("trunk_heads", "trunk")),
    ("sam2.image_encoder.trunk.*.mlp.fc1.kernel", ("trunk", "trunk_mlp")),
    ("sam2.image_encoder.trunk.*.mlp.fc1.bias", ("trunk_mlp",)),
    ("sam2.image_encoder.trunk.*.mlp.fc2.kernel", ("trunk_mlp", "trunk")),
    ("sam2.image_encoder.trunk.*.proj.kernel", ("trunk", None)),
    ("sam2.image_encoder.trunk.*", (None,)),
    ("sam2.image_encoder.neck.*.kernel", (None, None, "trunk", None)),
    # the rest of SAM2 is small: its kernels are split by their input, if at all
    ("sam2.*.dwconv.kernel", (None, None, None, "mask")),
    ("sam2.*.pwconv?.kernel", ("mask", None)),
    ("sam2.sam_mask_decoder.upscale_conv?.kernel", ("mask", None, None, None)),
    ("sam2.*conv*.kernel", (None, None, "mask", None)),
    ("sam2.memory_encoder.pix_feat_proj.kernel", (None, None, "mask", None)),
    ("sam2.memory_encoder.out_proj.kernel", (None, None, "mask", None)),
    ("sam2.mask_downsample.kernel", (None, None, None, None)),
    ("sam2.*.kernel", ("mask", None)),
    ("sam2.sam_prompt_encoder.p*", (None, None)),
    ("sam2.*_token", (None, None)),
    ("sam2.*.mask_tokens", (None, None)),
    ("sam2.maskmem_tpos_enc", (None, None)),
    ("sam2.*", (None,)),
)

# Every device holds everything and works on its share of the batch.
DATA_PARALLEL: Strategy = {"batch": "data"}
# Beside the batch, every device holds a share of the parameters, gradients and optimiser state, and gathers a
# layer when it needs it (Zhao et al. 2023, arXiv 2304.11277).
FSDP: Strategy = dict.fromkeys(("batch", "embed", "rank", "vision", "trunk", "folded", "mask"), "data")

STRATEGIES: dict[str, Strategy] = {"data_parallel": DATA_PARALLEL, "fsdp": FSDP}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        InputError: there is none.
    """
    if name not in STRATEGIES:
        raise InputError(f"Unknown sharding strategy {name!r}: choose one of {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (of all hosts) in one row named "data"."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """The meaning of every axis of the parameter at a dotted path.

    Raises:
        InputError: the table has no row for it, or a row of another number of axes.
    """
    layer, _, part = path.partition(".lora.")
    if part:  # an adapter splits the kernel's (in, out) into (in, rank) and (rank, out)
        *stack, axis_in, axis_out = logical_axes(f"{layer}.kernel", ndim)
        return (*stack, axis_in, "rank") if part == "a" else (*stack, "rank", axis_out)
    axes = next((axes for pattern, axes in LOGICAL_AXES if fnmatchcase(path, pattern)), None)
    if axes is None or ndim - len(axes) not in (0, 1):
        raise InputError(f"The parameter {path!r} with {ndim} axes has no row in LOGICAL_AXES: add one.")
    return ("layer", *axes) if ndim > len(axes) else axes


def partition_spec(path: str, shape: Sequence[int], strategy: Strategy, mesh: Mesh) -> PartitionSpec:
    """Which mesh axis splits which axis of a parameter.

    An axis whose size the mesh axis does not divide stays whole, and a mesh axis splits an array only once.
    """
    spec: list[str | None] = []
    for size, meaning in zip(shape, logical_axes(path, len(shape)), strict=True):
        axis = strategy.get(meaning) if meaning else None
        usable = axis is not None and axis not in spec and size % mesh.shape[axis] == 0
        spec.append(axis if usable else None)
    return PartitionSpec(*spec)


def tree_shardings(tree: Any, strategy: Strategy, mesh: Mesh) -> Any:
    """The layout of every array in a tree that holds tables of parameters.

    A leaf below a parameter's path (the parameter itself, its gradient, its optimiser moments) is laid out as
    that parameter; everything else is whole on every device.
    """

    def layout(keys, leaf):
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        # Every parameter lies inside a module, so its path has a dot; other names are not paths.
        path = next((name for name in reversed(names) if "." in name), None)
        spec = partition_spec(path, leaf.shape, strategy, mesh) if path else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(layout, tree)


def batch_sharding(strategy: Strategy, mesh: Mesh) -> NamedSharding:
    """Batches are split along their first axis."""
    return NamedSharding(mesh, PartitionSpec(strategy["batch"]))


def require_divisible(batch_size: int, strategy: Strategy, mesh: Mesh) -> None:
    """Refuse a batch that the devices cannot share evenly.

    Raises:
        InputError: names both numbers.
    """
    devices = mesh.shape[strategy["batch"]]
    if batch_size % devices:
        raise InputError(
            f"A batch of {batch_size} samples cannot be split over {devices} devices: "
            f"choose a multiple of {devices}."
        )


class Row(NamedTuple):
    """What `explain` says about one parameter."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    spec: PartitionSpec
    bytes_per_device: int


def explain(parameters: Mapping[str, jax.Array], strategy: Strategy, mesh: Mesh) -> list[Row]:
    """Where every parameter lies and what it costs a device, the most expensive first."""
    rows = []
    for path, value in parameters.items():
        spec = partition_spec(path, value.shape, strategy, mesh)
        shard = NamedSharding(mesh, spec).shard_shape(tuple(value.shape))
        size = int(np.prod(shard)) * value.dtype.itemsize
        rows.append(Row(path, tuple(value.shape), logical_axes(path, len(value.shape)), spec, size))
    return sorted(rows, key=lambda row: -row.bytes_per_device)
