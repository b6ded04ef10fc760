"""Which window a study is shown in, and its values in that window as grey levels."""

from __future__ import annotations

import numpy as np

from unibiomed_jax.config.preprocessing import Preprocessing
from unibiomed_jax.errors import InputError
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.windows import Window


def choose_window(
    study: Study, preprocessing: Preprocessing, asked: str | tuple[float, float] | None = None
) -> Window:
    """The window of a study of one value a pixel.

    Args:
        study: to be shown.
        preprocessing: the windows of the checkpoint that will see it.
        asked: the name of one of its windows, "own" (the file's), "percentile", or (low, high). By default
            what the checkpoint saw of this modality.

    Raises:
        InputError: nothing says which window a CT has, or what was asked for is not there.
    """
    names = [preset.name for preset in preprocessing.ct_windows]
    names += ["own"] * bool(study.own_windows) + ["percentile"]
    choices = ", ".join([*map(repr, names), "low and high"])
    if isinstance(asked, tuple):
        low, high = map(float, asked)
        if not (np.isfinite([low, high]).all() and low < high):
            raise InputError(f"The window {low:g} to {high:g} is impossible; give low before high.")
        return Window(low, high, "stated")
    if asked == "own":
        if not study.own_windows:
            raise InputError(f"{study.series_alias} brings no window of its own; give another ({choices}).")
        return study.own_windows[0]
    if asked == "percentile":
        return _percentiles(study, preprocessing)
    if asked is not None:
        if preprocessing.ct_window(asked) is None:
            raise InputError(f"There is no window {asked!r}; give one of {choices}.")
        if study.modality != "CT" and study.modality != "unknown":
            raise InputError(
                f"The window {asked!r} is one of CT but {study.series_alias} is {study.modality}; leave it "
                "out."
            )
        return _preset(asked, preprocessing)
    if study.modality == "CT":
        name = ct_preset(study.body_part, preprocessing)
        if name is None:
            raise InputError(
                f"Nothing says which window the CT {study.series_alias} was meant for; give one of {choices}."
            )
        return _preset(name, preprocessing)
    if study.modality == "unknown":
        raise InputError(
            f"{study.series_alias} does not say whether it is a CT; state its modality (--modality), or "
            f"its window (--window): one of {choices}."
        )
    if study.unit == "SUV" and preprocessing.suv_window is not None:
        return Window(*preprocessing.suv_window, "preset SUV")
    if _is_eight_bit(study):
        return Window(0.0, 255.0, "kept: the values are grey levels")
    if study.modality not in ("MR", "PT", "NM") and study.own_windows:
        return study.own_windows[0]  # radiographs and ultrasound were shown as their makers meant
    return _percentiles(study, preprocessing)


def require_window(study: Study, window: Window | None) -> None:
    """Raise InputError unless a study can be shown: a grey one needs a window."""
    if window is None and not study.is_colour:
        raise InputError(
            f"A picture of {study.series_alias} needs a window; pass window=choose_window(study, ...)."
        )


def ct_preset(body_part: str, preprocessing: Preprocessing) -> str | None:
    """The window of a CT of this body part; None if nothing says which."""
    fitting = (preset.name for preset in preprocessing.ct_windows if body_part.upper() in preset.body_parts)
    return preprocessing.ct_default or next(fitting, None)


def to_grey(study: Study, window: Window, *, truncate: bool, index: int) -> np.ndarray:
    """Slice `index` as (rows, columns) uint8 grey levels, or its own colours (rows, columns, 3).

    What was not measured is as dark as the window's low end. Where low is meant white, it is white.
    """
    values = study.values[index]
    if study.is_colour:
        return values
    share = window.shares(values)
    if study.padding is not None:
        share = np.where(study.padding[index], 0, share)
    if study.white_is_low:
        share = 1 - share
    # A little above, so that a value at a level's edge does not fall below it by float32's rounding.
    grey = share * 255
    return np.floor(grey + 1e-4).astype(np.uint8) if truncate else np.rint(grey).astype(np.uint8)


def _preset(name: str, preprocessing: Preprocessing) -> Window:
    preset = preprocessing.ct_window(name)
    assert preset is not None
    return Window(preset.low, preset.high, f"preset {name}")


def _is_eight_bit(study: Study) -> bool:
    values = study.values
    return (
        study.modality not in ("MR", "PT", "NM", "CT")
        and values.min() >= 0
        and values.max() <= 255
        and values.max() > 1
        and not study.own_windows
    )


def _percentiles(study: Study, preprocessing: Preprocessing) -> Window:
    """Of the whole volume, without what was not measured."""
    values = study.values
    wanted = np.ones(values.shape, bool) if study.padding is None else ~study.padding
    if preprocessing.positive_only:
        wanted &= values > 0
    if not wanted.any():
        raise InputError(f"{study.series_alias} holds nothing but background; choose another series.")
    low, high = np.percentile(values[wanted], preprocessing.percentiles)
    shares = " and ".join(f"{share:g}" for share in preprocessing.percentiles)
    of = " of values above 0" if preprocessing.positive_only else ""
    return Window(float(low), float(max(high, low + 1e-6)), f"percentiles {shares}{of}")
