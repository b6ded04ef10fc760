"""How grey values and slices looked to a checkpoint when it was trained: windows, orientation, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Where the rows and columns of a slice run: as a radiologist looks at it, or along the voxel axes of a NIfTI
# file in right-anterior-superior order (an axial slice has the spine at its left and is mirrored).
SliceOrientation = Literal["radiological", "ras_voxel"]


@dataclass(frozen=True)
class WindowPreset:
    """A window of CT values and the words of the site that stood in the training sentences with it."""

    # By which it is asked for.
    name: str
    # Black, HU.
    low: float
    # White, HU.
    high: float
    # "liver in abdomen CT"; empty where the sentences of several sites went with it.
    wording: str
    # Values of the DICOM attribute Body Part Examined that mean this site.
    body_parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preprocessing:
    """What was done to a slice before the network saw it."""

    # Of the preset it comes from, for people.
    name: str
    # Windows of CT; their names differ.
    ct_windows: tuple[WindowPreset, ...]
    # The window of every CT, or None: one must be stated, or follow from the body part.
    ct_default: str | None
    # Window of PET in standardized uptake values, or None: percentiles.
    suv_window: tuple[float, float] | None
    # Values that are zero or less are left out of the percentiles of MRI and other scans, and stay black.
    positive_only: bool
    # Orientation of CT slices; all others were radiological.
    ct_orientation: SliceOrientation
    # Black borders make a slice square; otherwise the network's resizing stretches it.
    pad_to_square: bool
    # Grey levels are rounded down, not to the nearest.
    truncate: bool
    # Percentiles that become black and white where no window is fixed.
    percentiles: tuple[float, float] = (0.5, 99.5)

    def ct_window(self, name: str) -> WindowPreset | None:
        """The window of CT of this name, if there is one."""
        return next((preset for preset in self.ct_windows if preset.name == name), None)


PREPROCESSING: dict[str, Preprocessing] = {
    # BiomedParse's training data, on which the released weights were trained.
    "released": Preprocessing(
        name="released",
        ct_windows=(
            WindowPreset("abdomen", -150, 250, "abdomen CT", ("ABDOMEN",)),
            WindowPreset("lung", -1000, 1000, "lung CT", ("LUNG", "CHEST", "THORAX")),
            WindowPreset("pelvis", -55, 200, "pelvis CT", ("PELVIS",)),
            WindowPreset("liver", -25, 230, "abdomen CT", ("LIVER",)),
            WindowPreset("colon", -68, 187, "abdomen CT", ("COLON",)),
            WindowPreset("pancreas", -100, 200, "abdomen CT", ("PANCREAS",)),
        ),
        ct_default=None,
        suv_window=None,
        positive_only=True,
        ct_orientation="ras_voxel",
        pad_to_square=True,
        truncate=True,
    ),
    # The sample dataset, on which unibiomed-tiny was trained.
    "tiny": Preprocessing(
        name="tiny",
        ct_windows=(WindowPreset("soft tissue", -160, 240, ""),),
        ct_default="soft tissue",
        suv_window=(0.0, 10.0),
        positive_only=False,
        ct_orientation="radiological",
        pad_to_square=False,
        truncate=False,
    ),
}
