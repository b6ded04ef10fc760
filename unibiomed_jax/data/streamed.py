"""JSON tables read piece by piece, and values that lie on a disk until they are asked for."""

import codecs
import json
import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from unibiomed_jax.files import read_range, unlike_keys

# Bytes that are read at once.
_READ = 1 << 22


class Spilled(Sequence):
    """Values in a temporary file, each read when it is asked for; memory holds eight bytes of each."""

    def __init__(self, values: Iterable):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it goes with this object)
        self._starts = array("Q", [0])
        for value in values:
            self._starts.append(self._starts[-1] + self._file.write(pickle.dumps(value)))
        self._file.flush()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, end = self._starts[number], self._starts[number + 1]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))

    def __iter__(self) -> Iterator[Any]:
        """The values in order, many of which are read at once."""
        first, content = 0, b""
        for start, end in pairwise(self._starts):
            if end > first + len(content):
                first, content = start, os.pread(self._file.fileno(), max(_READ, end - start), start)
            yield pickle.loads(content[start - first : end - first])


class SpilledObject(Mapping):
    """A JSON object whose values lie in a file."""

    def __init__(self, items: Iterable[tuple[str, Any]]):
        self._numbers: dict[str, int] = {}
        self._values = Spilled(self._values_of(items))

    def _values_of(self, items: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        for key, value in items:
            self._numbers[key] = len(self._numbers)
            yield value

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __getitem__(self, key: str) -> Any:
        return self._values[self._numbers[key]]


# Members of a table that grow with the dataset.
LARGE = ("images", "annotations", "volumes")


def read_members(path: Path, *, depth: int) -> dict[str, Any] | SpilledObject:
    """The object that a JSON file holds, as `files.read_json` reads it, of which no large part is in memory.

    Args:
        path: of the file.
        depth: of what is spilled: 1, the object's values; 2, the members of what is LARGE.

    Raises:
        ValueError: the file holds something else, or is not valid.
    """
    reader = _Reader(_pieces(path))
    if depth == 1:
        table = SpilledObject((key, reader.value()) for key in reader.keys())
    else:
        table = {key: reader.spilled() if key in LARGE else reader.value() for key in reader.keys()}
    reader.require("")
    return table


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file in any encoding of JSON."""
    start, size, decoder = 0, path.stat().st_size, None
    while start < size and (piece := read_range(path, start, _READ)):
        if decoder is None:
            decoder = codecs.getincrementaldecoder(json.detect_encoding(piece))()
        start += len(piece)
        yield decoder.decode(piece)
    if decoder is not None:
        yield decoder.decode(b"", final=True)


class _Reader:
    """Reads JSON values one after the other; whatever is wrong with them is a ValueError."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._text, self._at = pieces, "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=unlike_keys)

    def spilled(self) -> Any:
        """The next value, a list or an object spilled."""
        return {"[": self._list, "{": self._object}.get(self._peek(), self.value)()

    def _list(self) -> Spilled:
        return Spilled(self.value() for _ in self._commas("[", "]"))

    def _object(self) -> SpilledObject:
        return SpilledObject((key, self.value()) for key in self.keys())

    def keys(self) -> Iterator[str]:
        """The keys of an object; whoever gets one reads its value before asking for the next."""
        known = set()
        for _ in self._commas("{", "}"):
            key = self.value()
            if not isinstance(key, str) or key in known:
                raise ValueError(f"{key!r} is no key, or a second one")
            known.add(key)
            self.require(":")
            yield key

    def value(self) -> Any:
        """The next value."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except ValueError:  # perhaps for it goes on in the next piece
                if self._more():
                    continue
                raise
            # A number, too, may go on: 1 and 1. begin 1.5.
            if self._text[end : end + 1] in tuple(" \t\n\r,:]}") or not self._more():
                break
        # An escape that may be half of a character, which is no text.
        if self._text.find("\\ud", self._at, end) >= 0 or self._text.find("\\uD", self._at, end) >= 0:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        self._at = end
        return value

    def require(self, wanted: str) -> None:
        """Pass over this character ("": the end)."""
        if self._peek() != wanted:
            raise ValueError(f"{self._peek()!r} instead of {wanted!r}")
        self._at += len(wanted)

    def _commas(self, start: str, end: str) -> Iterator[None]:
        """Once for everything that lies between two marks, with commas in between."""
        self.require(start)
        if self._peek() != end:
            yield
            while self._peek() == ",":
                self.require(",")
                yield
        self.require(end)

    def _peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Read on; whether there was something. What was read before is forgotten."""
        for piece in self._pieces:
            if piece:
                self._text, self._at = self._text[self._at :] + piece, 0
                return True
        return False
