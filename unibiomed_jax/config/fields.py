"""Configurations and plain values: to JSON and back, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Annotated, Any, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import locate

# A path that may lie in a bucket, as an option of a command.
Address = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: locate(given[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [os.fspath(path)],
    ),
]


class Limit(NamedTuple):
    """What a number may be; it stands beside its field: `steps: Annotated[int, ONE_OR_MORE]`."""

    # In words, after "give".
    words: str
    # NaN never holds.
    holds: Callable[[Any], bool]


ONE_OR_MORE = Limit("1 or more", lambda value: 1 <= value < math.inf)
TWO_OR_MORE = Limit("2 or more", lambda value: 2 <= value < math.inf)
ZERO_OR_MORE = Limit("0 or more", lambda value: 0 <= value < math.inf)
ABOVE_ZERO = Limit("a number above 0", lambda value: 0 < value < math.inf)
SHARE = Limit("0 to 1", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Limit("a number above 0, at most 1", lambda value: 0 < value <= 1)
BELOW_ONE = Limit("0 to less than 1", lambda value: 0 <= value < 1)
SEED = Limit("0 to 4294967295", lambda value: 0 <= value < 2**32)
SIZES = Limit("one or more sizes from 1 on", lambda sizes: len(sizes) > 0 and min(sizes) >= 1)


def require_limits(config: object, prefix: str = "", of: str = "") -> None:
    """Refuse a number outside the limit beside its field, through tables inside tables.

    Args:
        config: a dataclass.
        prefix: what stands before a field's name in the message.
        of: what stands after the value in it.

    Raises:
        InputError: names the field, its value and what it may be.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if value is None:
            continue
        for limit in getattr(hint, "__metadata__", ()):
            if isinstance(limit, Limit) and not limit.holds(value):
                raise InputError(f"{prefix}{name}={value}{of} is impossible; give {limit.words}.")
        if dataclasses.is_dataclass(value):
            require_limits(value, f"{prefix}{name}.", of)


def to_dict(config) -> dict:
    """A config as plain JSON-ready values."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, where: str = ""):
    """Build the dataclass `cls` from plain values, strictly.

    Raises:
        InputError: an unknown field (names the nearest known one) or a value of the wrong type.
    """
    where = where or cls.__name__
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a table of fields, not {values!r}.")
    for key in values:
        if key not in hints:
            raise unknown_field(cls, key, where)
    return cls(**{key: _coerce(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def unknown_field(cls, key: str, where: str) -> InputError:
    """The error for a field that the dataclass `cls` does not have."""
    names = [f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(names)}."
    return InputError(f"Unknown field {key!r} in {where}: {hint}")


def _coerce(hint, value, where: str):
    """A plain value as its field has it: JSON knows neither tuples nor dataclasses, and writes 1.0 as 1."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and value is not None:  # always "or None"
        return _coerce(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is tuple and isinstance(value, list):
        hints = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(hints) == len(value):
            parts = zip(hints, value, strict=True)
            value = tuple(_coerce(kind, part, f"{where}.{i}") for i, (kind, part) in enumerate(parts))
    if hint is float and type(value) is int:
        value = float(value)
    require_type(hint, value, where)
    return value


def require_type(hint, value, where: str) -> None:
    """Check a value against the type of its field, through tuples and dataclasses down to their last field.

    A whole number may stand for a float.

    Raises:
        InputError: names the first value of another type, or none of the field's choices.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # always "or None"
        if value is not None:
            require_type(inner[0], value, where)
    elif origin is tuple and isinstance(value, tuple) and (inner[-1] is ... or len(inner) == len(value)):
        for number, part in enumerate(value):
            require_type(inner[0], part, f"{where}.{number}")
    elif dataclasses.is_dataclass(hint) and isinstance(value, hint):
        for name, kind in typing.get_type_hints(hint).items():
            require_type(kind, getattr(value, name), f"{where}.{name}")
    elif not _fits(hint, value):
        whole = hint is int and isinstance(value, float) and value.is_integer()
        remedy = f"; give {value:.0f}" if whole else ""
        raise InputError(f"{where} must be {_wanted(hint)}, not {reprlib.repr(value)}{remedy}.")


def _fits(hint, value) -> bool:
    if typing.get_origin(hint) is tuple:
        return False  # those that fit were looked into
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _wanted(hint) -> str:
    """What a field of this type takes, in words."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        return "a tuple, as in (one,) or (one, two)"
    if issubclass(hint, enum.Enum):
        return f"one of {', '.join(f'{hint.__name__}.{choice.name}' for choice in hint)}"
    return f"of type {hint.__name__}"
