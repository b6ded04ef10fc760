"""Arithmetic of a program before any compiler sees it, from its jaxpr: loops as often as they run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# Operations by the numbers that are multiplied and how precisely: ("bfloat16", "default"), ("float32",
# "highest").
Operations = dict[tuple[str, str], float]


def operations(jaxpr: ClosedJaxpr, unknown_trips: int = 1) -> Operations:
    """Operations of all matrix products and convolutions, of all devices together.

    A multiplication and an addition are two. Of the branches of a condition that with most work counts; a
    loop of unknown length counts `unknown_trips` times.
    """
    total: Operations = defaultdict(float)
    _count(jaxpr.jaxpr, 1.0, total, unknown_trips)
    return dict(total)


def _count(jaxpr: Jaxpr, times: float, total: Operations, unknown: int) -> None:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            depth = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        elif name == "cond":
            branches = [operations(branch, unknown) for branch in params["branches"]]
            _add(total, max(branches, key=lambda branch: sum(branch.values())), times)
            continue
        elif name == "pallas_call" and params.get("cost_estimate") is not None:
            _add(total, {_kind(equation): float(params["cost_estimate"].flops)}, times)
            continue
        else:
            runs = times * _repeats(name, params, unknown)
            for inner in _inner(name, params):
                _count(inner, runs, total, unknown)
            continue
        total[_kind(equation)] += times * 2 * math.prod(equation.outvars[0].aval.shape) * depth


def _add(total: Operations, part: Operations, times: float) -> None:
    for kind, count in part.items():
        total[kind] += times * count


def _kind(equation: Any) -> tuple[str, str]:
    """What is multiplied, and how precisely."""
    dtypes = [str(variable.aval.dtype) for variable in equation.invars[:2]]
    precision = equation.params.get("precision")
    precision = precision[0] if isinstance(precision, tuple) else precision
    name = "default" if precision is None else str(getattr(precision, "name", precision)).lower()
    return ("float32" if "float32" in dtypes else dtypes[0]), name


def _repeats(name: str, params: Mapping[str, Any], unknown: int) -> float:
    """How often an equation runs what is inside of it, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "while":
        return unknown
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # what is inside is a device's
        manual = params.get("manual_axes") or params["mesh"].axis_names
        return math.prod(params["mesh"].shape[axis] for axis in manual)
    return 1


def _inner(name: str, params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """Programs inside of an equation that run with it; rules of gradients do not."""
    for key, value in params.items():
        if key in ("cond_jaxpr", "fwd_jaxpr_thunk", "jvp_jaxpr_fun", "bwd"):
            continue
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def text(kind: tuple[str, str]) -> str:
    """A kind of product in words."""
    dtype, precision = kind
    return dtype if precision == "default" or dtype != "float32" else f"{dtype} at {precision!r}"
