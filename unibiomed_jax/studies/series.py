"""What can be opened: a line of the list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unibiomed_jax.studies.study import Study


@dataclass(frozen=True)
class Series:
    """A volume, a film or a picture that was found, not yet read."""

    # Its name in messages and outputs.
    alias: str
    # DICOM's SeriesInstanceUID, or "". Never printed.
    uid: str
    modality: str
    body_part: str
    # Slices (or frames), rows, columns.
    shape: tuple[int, int, int]
    plane: str | None
    # Between slices, rows, columns, mm.
    spacing: tuple[float, float, float] | None
    # What is odd about it.
    notes: tuple[str, ...]
    # The sentence why it cannot be opened, if so.
    refusal: str | None
    load: Callable[[], Study]
