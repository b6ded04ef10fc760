"""A grey window: the values from black to white."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np


@dataclass(frozen=True, eq=False)
class Window:
    """Values that become black (`low`) and white (`high`), in the unit of the study."""

    low: float
    high: float
    # Where it comes from: "preset abdomen", "stated", "the file's own", "percentiles 0.5 and 99.5".
    origin: str
    # The file's own window may be a curve of this centre and width (`low` and `high` are then its ends).
    curve: Literal["linear", "sigmoid"] = "linear"
    # Or a table of grey from 0 to 1, of values evenly from `low` to `high`.
    table: np.ndarray | None = None

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g} ({self.origin})"

    def scaled(self, factor: float) -> Window:
        """The same window of values that are multiplied by a factor."""
        return replace(self, low=self.low * factor, high=self.high * factor)

    def shares(self, values: np.ndarray) -> np.ndarray:
        """Values as shares of white, float32 from 0 to 1."""
        share = (values - np.float32(self.low)) / np.float32(self.high - self.low)
        if self.table is not None:
            last = len(self.table) - 1
            return self.table[np.clip(np.rint(share * last), 0, last).astype(np.int64)]
        if self.curve == "sigmoid":  # 1 / (1 + exp(-4 (x - centre) / width))
            return 1 / (1 + np.exp(-4 * (share - np.float32(0.5))))
        return np.clip(share, 0, 1)


def own_window(centre: float, width: float, function: str) -> Window | None:
    """The window that DICOM's centre, width and VOI LUT function mean; None if it is impossible."""
    origin = "the file's own"
    if function == "LINEAR_EXACT" and width > 0:
        return Window(centre - width / 2, centre + width / 2, origin)
    if function == "SIGMOID" and width > 0:
        return Window(centre - width / 2, centre + width / 2, origin, "sigmoid")
    if function not in ("LINEAR", "") or width < 1:
        return None
    # From centre - 0.5 - (width - 1) / 2 to centre - 0.5 + (width - 1) / 2; a width of 1 is a threshold.
    half = max(width - 1, 1e-3) / 2
    return Window(centre - 0.5 - half, centre - 0.5 + half, origin)
