"""Masks as COCO compressed run-length encodings, in JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco

from unibiomed_jax.errors import InputError


def encode(mask: Bool[np.ndarray, "*slices height width"]) -> dict | list[dict]:
    """A mask ready for JSON; one of a volume is a list, an entry per slice."""
    if mask.ndim == 3:
        return [encode(piece) for piece in mask]
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def decode(value: Any, where: str) -> Bool[np.ndarray, "*slices height width"]:
    """The mask that `encode` wrote.

    Args:
        value: from JSON.
        where: it stood, for the message.

    Raises:
        InputError: it is no such encoding, or the slices of a volume are of several sizes.
    """
    pieces = value if isinstance(value, list) else [value]
    try:
        sizes = {tuple(piece["size"]) for piece in pieces}
        height, width = max(sizes)
        if len(sizes) > 1:
            raise InputError(f"{where} has slices of several sizes; write its masks again.")
        inside = np.zeros((len(pieces), width, height), bool)  # the runs go down the columns
        empty: set[str] = set()  # most slices of most volumes
        for piece, one in zip(pieces, inside, strict=True):
            counts = piece["counts"]
            if counts in empty:
                continue
            runs = _runs(counts)
            if not 0 < height * width == runs.sum():
                raise ValueError
            if len(runs) == 1:
                empty.add(counts)
            else:
                one.reshape(-1)[:] = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, MemoryError):
        raise InputError(
            f"{where} holds a mask that is no COCO run-length encoding; write it again."
        ) from None
    masks = inside.transpose(0, 2, 1)
    return masks if isinstance(value, list) else masks[0]


def _runs(counts: str) -> np.ndarray:
    """Lengths of the runs, outside and inside by turns.

    A number is in groups of five bits, the lowest first; bit 5 says that another follows, the highest bit of
    the last is the sign. From the fourth on it is the difference to the number before the last.
    """
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        raise ValueError
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # no mask has 2^34 pixels
        raise ValueError
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= (codes[ends] >> 4 & 1) << 5 * lengths
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    if runs.min() < 0:
        raise ValueError
    return runs
