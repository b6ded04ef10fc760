"""What is done of a long answer: in memory, or in a folder where a later run goes on from it."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import delete_folder, write_beside

# A name that nobody else gives a file, for folders with it are deleted.
_REQUEST = ".unibiomed-half-done.json"
# How many arrays lie under a name, for a damaged file may show fewer.
_COUNT = "count of arrays"


class Kept:
    """Arrays by name, each name put whole or not at all."""

    def __init__(self, folder: str | os.PathLike | None, request: Mapping):
        """What lies in the folder for another request is deleted.

        Raises:
            InputError: the folder holds something else, or cannot be written.
        """
        self._folder = None if folder is None else Path(folder)
        self._arrays: dict[str, dict[str, np.ndarray]] = {}
        if self._folder is None:
            return
        text = json.dumps(request, indent=2, ensure_ascii=False)
        try:
            if self._folder.is_dir() and any(self._folder.iterdir()):
                if not ((self._folder / _REQUEST).is_file() and all(map(_is_own, self._folder.iterdir()))):
                    raise InputError("The folder for what is half done holds something else; choose another.")
                if (self._folder / _REQUEST).read_text(encoding="utf-8") == text:
                    return
                delete_folder(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_beside(self._folder / _REQUEST, text.encode())
        except OSError as error:
            raise InputError(
                f"The folder for what is half done cannot be written ({error.strerror}); choose another."
            ) from None

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """What was put under a name; None if nothing was, or it is damaged."""
        if self._folder is None:
            return self._arrays.get(name)
        try:
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as file:
                found = dict(file)
            return found if int(found.pop(_COUNT)) == len(found) else None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, RuntimeError):
            return None

    def put(self, name: str, **arrays: np.ndarray) -> None:
        """Keep arrays under a name."""
        if self._folder is None:
            self._arrays[name] = arrays
        else:
            counted = {**arrays, _COUNT: np.array(len(arrays))}
            write_beside(self._folder / f"{name}.npz", lambda file: np.savez(file, **counted))


def _is_own(path: Path) -> bool:
    """Whether `Kept` wrote a file, or began to."""
    return path.is_file() and any(mark in path.name for mark in (_REQUEST, ".npz"))
