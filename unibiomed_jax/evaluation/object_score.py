"""Whether a model's object score tells what is there from what is not, so that masks may be hidden by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from unibiomed_jax.evaluation.bootstrap import COVERAGE, DRAWS, FEWEST, SEED
from unibiomed_jax.evaluation.records import Sample, decode_masks

# Bins of the probability that a score means.
BINS = 10
# Logits above which a mask could be kept; `hide_absent` takes the middle one.
THRESHOLDS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
# Logits that are no further apart say nothing about anything.
_SAME = 1e-3
_BLOCK = 100


def object_score_table(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What the scores of records with one truth are worth; None if no record has a score.

    A record counts by its first mask. The AUROC is the chance that a target that is there scores higher than
    one that is not (half for equal scores); its interval draws patients. For every threshold: which share of
    absent and of present targets would be hidden, and the mean Dice over all records then (an absent target
    without a mask counts 1).
    """
    kept = [
        sample
        for sample in samples
        if sample.object_scores and len(sample.truth_masks) == 1 and "dice" in sample.scores.get("strict", {})
    ]
    if not kept:
        return None
    scores = np.array([sample.object_scores[0] for sample in kept])
    present = np.array([decode_masks(s.truth_masks, s.doc_id)[0].any() for s in kept])
    dice = np.array([sample.scores["strict"]["dice"] for sample in kept])
    chance = 1 / (1 + np.exp(-scores))
    bins = np.minimum((chance * BINS).astype(int), BINS - 1)
    groups = [(sample.dataset, sample.group) for sample in kept]
    auroc, interval = _auroc_with_interval(scores, present, groups)
    return {
        "n": len(kept),
        "present": int(present.sum()),
        "absent": int((~present).sum()),
        "lowest": float(scores.min()),
        "highest": float(scores.max()),
        # A head without training gives every target the same score.
        "constant": float(np.ptp(scores)) < _SAME,
        "auroc": auroc,
        "auroc_interval": interval,
        "bins": [
            {
                "from": number / BINS,
                "to": (number + 1) / BINS,
                "n": int(inside.sum()),
                "chance": float(chance[inside].mean()),
                "present": float(present[inside].mean()),
            }
            for number in range(BINS)
            if (inside := bins == number).any()
        ],
        "thresholds": [
            {
                "above": threshold,
                "absent_hidden": _share((scores <= threshold) & ~present, ~present),
                "present_hidden": _share((scores <= threshold) & present, present),
                "dice": float(np.where(scores <= threshold, ~present, dice).mean()),
            }
            for threshold in THRESHOLDS
        ],
        "dice": float(dice.mean()),
    }


def _share(part: Bool[np.ndarray, " n"], whole: Bool[np.ndarray, " n"]) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


def _auroc_with_interval(
    scores: Float[np.ndarray, " n"], present: Bool[np.ndarray, " n"], groups: Sequence[Any]
) -> tuple[float | None, tuple[float, float] | None]:
    """The AUROC and its bootstrap over groups; None without targets of both kinds, or with few groups."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    of_group = np.array([names[group] for group in groups])[order]
    kinds = present[order]

    def auroc(weights: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        there, absent = (
            np.add.reduceat(np.where(kind, weights, 0.0), starts, axis=1) for kind in (kinds, ~kinds)
        )
        below = np.cumsum(absent, 1) - absent / 2
        pairs = there.sum(1) * absent.sum(1)
        return np.divide((there * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    whole = float(auroc(np.ones((1, len(scores))))[0])
    if np.isnan(whole):
        return None, None
    if len(names) < FEWEST:
        return whole, None
    generator = np.random.default_rng(SEED)
    found = []
    for _ in range(0, DRAWS, _BLOCK):
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), _BLOCK)
        found.append(auroc(drawn[:, of_group].astype(float)))
    tail = 50 * (1 - COVERAGE)
    low, high = np.nanpercentile(np.concatenate(found), [tail, 100 - tail])
    return whole, (float(low), float(high))
