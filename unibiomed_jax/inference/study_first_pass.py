"""The first pass over a study: every slice asked by itself, and the choice of those the words are about."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from unibiomed_jax.inference.answer import Request
from unibiomed_jax.inference.study_answer import distinct
from unibiomed_jax.inference.study_run import FIRST, Asking
from unibiomed_jax.inputs.prompt import IMAGE


def first_pass(asking: Asking, batch_size: int) -> tuple[list[float], list[float]]:
    """Ask every slice by itself; of each how surely it shows something, and how well it agrees.

    Presence is the highest object score of its masks that are not empty, as a share; agreement the Dice of
    all that is marked with the same of the neighbouring slices, their mean.
    """
    question, model = asking.question, asking.model
    prompt = asking.prompt if IMAGE in asking.prompt else f"{IMAGE}\n{asking.prompt}"
    todo = [index for index in range(asking.slices) if asking.kept.get(FIRST.format(index)) is None]
    done = asking.slices - len(todo)
    asking.progress("first pass", done, asking.slices)
    for start in range(0, len(todo), batch_size):
        group = todo[start : start + batch_size]
        with asking.timed("first pass"):
            answers = model.predict_batch(
                [Request(prompt, model.open(asking.frame(index))) for index in group],
                max_new_tokens=question.max_new_tokens,
                max_masks=question.max_masks,
                hide_absent=question.hide_absent,
            )
        for index, answer in zip(group, answers, strict=True):
            found = answer.segments
            asking.kept.put(
                FIRST.format(index),
                text=np.array(answer.text),
                names=np.array(distinct([segment.phrase for segment in found]), str),
                **asking.packed([segment.mask for segment in found]),
                ious=np.array([segment.iou for segment in found]),
                scores=np.array([segment.object_score for segment in found]),
            )
        done += len(group)
        asking.progress("first pass", done, asking.slices)
    presence, marked = [], []
    for index in range(asking.slices):
        found = asking.found(FIRST, index)
        seen = found["scores"][found["masks"].any(1)]
        presence.append(float(1 / (1 + np.exp(-seen.max()))) if len(seen) else 0.0)
        marked.append(np.bitwise_or.reduce(found["masks"], axis=0))
    return presence, agreement_of(marked)


def agreement_of(marked: Sequence[Bool[np.ndarray, " bytes"]]) -> list[float]:
    """Of each slice, bits of whose pixels are given, the mean Dice with its neighbours; 1 if it is alone."""

    def dice(one: np.ndarray, other: np.ndarray) -> float:
        both, total = (int(np.bitwise_count(bits).sum()) for bits in (one & other, np.r_[one, other]))
        return 2 * both / total if total else 0.0

    pairs = [dice(*pair) for pair in itertools.pairwise(marked)]
    sides = zip([None, *pairs], [*pairs, None], strict=True)
    return [float(np.mean([side for side in two if side is not None] or [1.0])) for two in sides]


def choose_slices(presence: Sequence[float], agreement: Sequence[float], limit: int) -> tuple[int, ...]:
    """The slices that the language model is shown, in order; their score is presence times agreement.

    Slices of at least half of the best score are cut, in their order, into `limit` groups as equal as can be,
    and each group gives its best one: so they show the target surely and are spread over it.
    """
    scores = np.multiply(presence, agreement)
    if not scores.any():  # marks that no neighbour shares, or none
        scores = np.asarray(presence)
    candidates = np.flatnonzero(scores >= scores.max() / 2)
    groups = np.array_split(candidates, min(limit, len(candidates)))
    return tuple(int(group[scores[group].argmax()]) for group in groups)
