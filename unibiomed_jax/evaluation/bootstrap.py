"""Means over cases, targets and datasets, and how far they may be trusted.

A score is averaged over the cases of a target, then over the targets of a dataset, then over the datasets, so
that a frequent target does not hide a rare one; the mean over all cases (micro) stands beside it. Intervals
are percentile bootstrap: the patients of a dataset, not its images, are drawn with replacement, and every
mean is computed anew for each draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

DRAWS = 2000
SEED = 0
COVERAGE = 0.95
# With fewer patients an interval would only look like one.
FEWEST = 5
# Draws whose counts are held at once.
_BLOCK = 200


@dataclass(frozen=True)
class Case:
    """What one record scored; scores that are not defined for it are left out."""

    dataset: str
    target: str
    patient: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """A mean of a score: over the whole (no dataset), over a dataset (no target), or over a target."""

    score: str
    dataset: str | None
    target: str | None
    value: float
    # 95 % interval; None for fewer than five patients.
    interval: tuple[float, float] | None
    cases: int
    patients: int
    # The mean over all cases, whatever their target and dataset.
    micro: float
    micro_interval: tuple[float, float] | None


def estimate(cases: Sequence[Case]) -> list[Estimate]:
    """All means of all scores, the whole first."""
    return _estimates(cases, None)


def estimate_difference(
    first: Sequence[Case], second: Sequence[Case]
) -> list[tuple[Estimate, Estimate, Estimate]]:
    """All means of `first`, of `second`, and their difference, with the same patients drawn for both.

    Args:
        first: cases of one system.
        second: the same cases of another, in the same order; a score that either lacks is left out.
    """
    kept_first, kept_second = [], []
    for one, other in zip(first, second, strict=True):
        names = [name for name in one.scores if name in other.scores]
        for case, kept in ((one, kept_first), (other, kept_second)):
            scores = {name: case.scores[name] for name in names}
            kept.append(Case(one.dataset, one.target, one.patient, scores))
    return list(
        zip(
            _estimates(kept_first, None),
            _estimates(kept_second, None),
            _estimates(kept_second, kept_first),
            strict=True,
        )
    )


def _estimates(cases: Sequence[Case], minus: Sequence[Case] | None) -> list[Estimate]:
    drawn = _draw_datasets(cases)
    subtracted = None if minus is None else _draw_datasets(minus)
    estimates: list[Estimate] = []
    for score in dict.fromkeys(name for case in cases for name in case.scores):
        means = _means(drawn, score)
        if subtracted is not None:
            others = _means(subtracted, score)
            means = {level: values - others[level] for level, values in means.items()}
        for kind, dataset, target in means:
            if kind == "micro":
                continue
            counts = [
                of_dataset.counts[:, of_dataset.columns(score, target)].sum(1)
                for name, of_dataset in drawn.items()
                if dataset in (None, name)
            ]
            patients = sum(int((of_patients > 0).sum()) for of_patients in counts)
            mean, micro = means[kind, dataset, target], means["micro", dataset, target]
            estimates.append(
                Estimate(
                    score,
                    dataset,
                    target,
                    float(mean[0]),
                    _interval(mean, patients),
                    sum(int(of_patients.sum()) for of_patients in counts),
                    patients,
                    float(micro[0]),
                    _interval(micro, patients),
                )
            )
    return estimates


@dataclass(frozen=True)
class _Drawn:
    """The scores of one dataset: a column is a score of a target.

    Sums and numbers of cases are over all patients first, then over those of every draw.
    """

    names: list[tuple[str, str]]
    counts: Int[np.ndarray, "patients columns"]
    drawn_sums: Float[np.ndarray, "1+draws columns"]
    drawn_counts: Float[np.ndarray, "1+draws columns"]

    def columns(self, score: str, target: str | None = None) -> list[int]:
        """Those of a score, of one target or of all."""
        return [n for n, name in enumerate(self.names) if name[0] == score and target in (None, name[1])]


def _draw_datasets(cases: Iterable[Case]) -> dict[str, _Drawn]:
    """All datasets by name. The draws depend on a dataset's name and its number of patients alone."""
    by_dataset: dict[str, list[Case]] = {}
    for case in cases:
        by_dataset.setdefault(case.dataset, []).append(case)
    return {dataset: _draw(dataset, found) for dataset, found in sorted(by_dataset.items())}


def _draw(dataset: str, cases: Sequence[Case]) -> _Drawn:
    rows = {name: row for row, name in enumerate(sorted({case.patient for case in cases}))}
    names = sorted({(score, case.target) for case in cases for score in case.scores})
    places = {name: column for column, name in enumerate(names)}
    sums, counts = np.zeros((len(rows), len(names))), np.zeros((len(rows), len(names)), np.int64)
    for case in cases:
        for score, value in case.scores.items():
            place = rows[case.patient], places[score, case.target]
            sums[place] += value
            counts[place] += 1
    both = np.concatenate([sums, counts], 1)
    generator = np.random.default_rng([SEED, zlib.crc32(dataset.encode())])
    totals = [both.sum(0, keepdims=True)]
    for start in range(0, DRAWS, _BLOCK):
        block = min(_BLOCK, DRAWS - start)
        patients = (
            generator.integers(0, len(rows), (block, len(rows))) + len(rows) * np.arange(block)[:, None]
        )
        weights = np.bincount(patients.reshape(-1), minlength=block * len(rows)).reshape(block, len(rows))
        totals.append(weights @ both)
    return _Drawn(names, counts, *np.split(np.concatenate(totals), 2, 1))


# "mean" or "micro", the dataset or None for the whole, the target or None for all.
Level = tuple[str, str | None, str | None]


def _means(drawn: Mapping[str, _Drawn], score: str) -> dict[Level, Float[np.ndarray, "1+draws"]]:
    """The means of a score at every level, the whole first."""
    by_dataset: dict[Level, np.ndarray] = {}
    sums, counts = np.zeros(1 + DRAWS), np.zeros(1 + DRAWS)
    for dataset, table in drawn.items():
        columns = table.columns(score)
        if not columns:
            continue
        drawn_sums, drawn_counts = table.drawn_sums[:, columns], table.drawn_counts[:, columns]
        of_targets = _divide(drawn_sums, drawn_counts)
        by_dataset["mean", dataset, None] = _mean(of_targets)
        by_dataset["micro", dataset, None] = _divide(drawn_sums.sum(1), drawn_counts.sum(1))
        for column, values in zip(columns, of_targets.T, strict=True):
            target = table.names[column][1]
            by_dataset["mean", dataset, target] = by_dataset["micro", dataset, target] = values
        sums, counts = sums + drawn_sums.sum(1), counts + drawn_counts.sum(1)
    of_datasets = [
        values for (kind, _, target), values in by_dataset.items() if kind == "mean" and target is None
    ]
    whole = {
        ("mean", None, None): _mean(np.stack(of_datasets, 1)),
        ("micro", None, None): _divide(sums, counts),
    }
    return whole | by_dataset


def _divide(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means; NaN where a draw has no case."""
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)


def _mean(values: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, "draws"]:
    """The mean over the columns that a draw has."""
    there = ~np.isnan(values)
    return _divide(np.where(there, values, 0).sum(1), there.sum(1))


def _interval(values: Float[np.ndarray, "1+draws"], patients: int) -> tuple[float, float] | None:
    if patients < FEWEST:
        return None
    tail = 50 * (1 - COVERAGE)
    low, high = np.nanpercentile(values[1:], [tail, 100 - tail])
    return float(low), float(high)
