"""A question about a study: slices shown as the checkpoint knows them, followed one by one, put back.

Whatever is held grows with the number of slices only as the study's values and the masks do: slices are made
grey, turned, encoded and segmented one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.kept import Kept
from unibiomed_jax.inference.study_answer import Conditioning, StudyAnswer, StudySegment
from unibiomed_jax.inference.study_first_pass import choose_slices, first_pass
from unibiomed_jax.inference.study_following import follow
from unibiomed_jax.inference.study_question import (
    Answerer,
    StudyQuestion,
    hash_of,
    request_of,
    require_possible,
    shown_as,
)
from unibiomed_jax.inference.study_run import FIRST, FOLLOWED, Asking, Progress
from unibiomed_jax.masks.parts import keep_parts
from unibiomed_jax.models.sam2 import plan_frames
from unibiomed_jax.studies.measures import measure
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.views import View, find_view


def ask_study(
    model: Answerer,
    study: Study,
    prompt: str,
    question: StudyQuestion,
    *,
    batch_size: int = 4,
    state: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> StudyAnswer:
    """Ask a study a question: words, and a mask on its grid for each thing they name.

    Args:
        model: the predictor.
        study: to be asked.
        prompt: the question. Where it does not say where the `<image>` goes, that is put before it, in 2-D
            with a line break, as in training. `{site}` becomes the words that stood with the window.
        question: see `StudyQuestion`.
        batch_size: slices of the first pass in one call.
        state: a folder for what is done so far: the same call goes on from there after an end of any kind.
            It stays; delete it once the answer is stored.
        progress: told after every slice.

    Raises:
        InputError: nothing says how the study is to be shown, or the question does not fit it.
    """
    preprocessing = model.config.preprocessing
    require_possible(question, study)
    window, prompt, notes = shown_as(study, prompt, preprocessing, question)
    view = find_view(study, preprocessing)
    require_inverse(view)
    request, study_hash = request_of(model, study, prompt, question), hash_of(study)
    kept = Kept(state, {"request": request, "checkpoint": model.checkpoint_hash, "study": study_hash})
    asking = Asking(model, study, prompt, question, window, view, kept, progress or (lambda *_: None))

    conditioning = _condition(asking, batch_size)
    if conditioning.choice == "each":
        name = FIRST
        text, names = _joined(asking)
        if asking.slices > 1:
            notes.append("every slice had an answer of its own; the text is the one of the likeliest slice")
    else:
        name = FOLLOWED
        text, names = follow(asking, conditioning.slices)
    if conditioning.presence and max(conditioning.presence) <= 0.5:
        notes.append("the model itself finds in no slice what was asked for")
    segments, cleaning = _segments(asking, names, name)
    return StudyAnswer(
        prompt=prompt,
        text=text,
        segments=segments,
        conditioning=conditioning,
        window=window,
        view=view,
        preprocessing=preprocessing,
        cleaning=cleaning,
        notes=tuple(notes),
        checkpoint_hash=model.checkpoint_hash,
        study_hash=study_hash,
        request=request,
        seconds=dict(asking.seconds),
    )


def require_inverse(view: View) -> None:
    """Refuse a view from which a mask would not come back to the very pixels it was drawn on.

    Raises:
        InputError: a pixel of the stored slice is lost or comes back at another place.
    """
    numbers = np.arange(view.rows * view.columns).reshape(view.rows, view.columns)
    if not np.array_equal(view.restore(view.show(numbers)), numbers):
        raise InputError(
            f"The view {view} cannot be undone, so that masks would lie elsewhere; this is a mistake of "
            "unibiomed_jax: report it."
        )


def _condition(asking: Asking, batch_size: int) -> Conditioning:
    """Which slices the language model is shown."""
    choice, limit = asking.question.conditioning, asking.model.config.sam2.max_conditioning_frames
    everything = tuple(range(asking.slices))
    if isinstance(choice, str):
        if choice not in ("auto", "first", "each"):
            raise InputError(f"There is no conditioning {choice!r}; give auto, first, each or slices.")
    else:
        plan_frames(asking.slices, asking.model.config.sam2, choice)
    if choice == "each" or asking.slices == 1:
        first_pass(asking, batch_size)
        reason = "every slice was asked by itself" if asking.slices > 1 else "there is only one slice"
        return Conditioning("each", everything, reason)
    if choice == "first":
        return Conditioning("first", everything[:limit], "the first ones, as the reference takes them")
    if choice != "auto":
        return Conditioning("stated", tuple(sorted(map(int, choice))), "as stated")
    presence, agreement = first_pass(asking, batch_size)
    chosen = choose_slices(presence, agreement, limit)
    reason = (
        f"of {asking.slices} slices asked one by one, these show the target most surely (presence times "
        "agreement with the neighbours) and are spread over it"
    )
    return Conditioning("auto", chosen, reason, tuple(presence), tuple(agreement))


def _joined(asking: Asking) -> tuple[str, list[str]]:
    """Of answers slice by slice the words of the one with the highest score, and the names of all."""
    text, best, names = "", -np.inf, {}
    for index in range(asking.slices):
        found = asking.found(FIRST, index)
        names |= dict.fromkeys(found["names"].tolist())
        score = max(found["scores"], default=-np.inf)
        if not text or score > best:
            text, best = str(found["text"]), score
    return text, list(names)


def _segments(
    asking: Asking, names: Sequence[str], name: str
) -> tuple[tuple[StudySegment, ...], tuple[str, ...]]:
    """The masks of all slices, cleaned as was asked for, and what was done to them."""
    question, study, shape = asking.question, asking.study, asking.study.values.shape[:3]
    pixel_ml = float(np.prod(study.geometry.spacing)) / 1000 if study.geometry is not None else 0.0
    smallest = question.smallest_ml / pixel_ml if question.smallest_ml is not None else 0.0
    segments, left_out = [], 0
    for wanted in names:
        mask = np.zeros(shape, bool)
        ious: list[float | None] = [None] * asking.slices
        scores: list[float | None] = [None] * asking.slices
        for index in range(asking.slices):
            found = asking.found(name, index)
            (rows,) = np.nonzero(found["names"] == wanted)
            for row in rows.tolist():
                bits = np.unpackbits(found["masks"][row], count=shape[1] * shape[2])
                mask[index] = bits.reshape(shape[1:])
                ious[index], scores[index] = float(found["ious"][row]), float(found["scores"][row])
        if question.parts is not None or smallest:
            with asking.timed("connected parts"):
                mask, fewer = keep_parts(mask, largest=question.parts, smallest=smallest)
            left_out += fewer
        segments.append(StudySegment(wanted, mask, tuple(ious), tuple(scores), measure(study, mask)))
    rules = [
        *([f"the {question.parts} largest connected parts were kept"] if question.parts is not None else []),
        *([f"parts below {question.smallest_ml:g} ml were left out"] if smallest else []),
    ]
    return tuple(segments), tuple([*rules, f"parts left out: {left_out}"] if rules else [])
