"""A question about a study: slices shown as the checkpoint knows them, followed one by one, put back.

Whatever is held grows with the number of slices only as the study's values and the masks do: slices are made
grey, turned, encoded and segmented one at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jaxtyping import Bool
from PIL import Image

from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.config.preprocessing import Preprocessing
from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.answer import Answer, OpenedImage, Request
from unibiomed_jax.inference.buckets import power_of_two
from unibiomed_jax.inference.kept import Kept
from unibiomed_jax.inference.phrases import parse_answer
from unibiomed_jax.inference.stages import Stages
from unibiomed_jax.inference.study_answer import Conditioning, StudyAnswer, StudySegment, distinct
from unibiomed_jax.inputs.prompt import IMAGE
from unibiomed_jax.inputs.tiles import frame_tiles, sam_image
from unibiomed_jax.masks.parts import keep_parts
from unibiomed_jax.masks.resize import upscale_masks
from unibiomed_jax.models.sam2 import FramePlan, TrackState, plan_frames
from unibiomed_jax.studies.grey import choose_window, to_grey
from unibiomed_jax.studies.measures import measure
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.views import View, find_view
from unibiomed_jax.studies.windows import Window

# Which slices the language model sees: chosen by a first pass over all, the first ones as in the reference,
# every one by itself, or these numbers from 0.
Conditions = Literal["auto", "first", "each"] | Sequence[int]
# Told what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]
# Seconds between two states of the tracking that are kept.
KEEP_EVERY = 20.0
# Under what names masks of slices are kept.
FIRST, FOLLOWED = "first_{:05d}", "slice_{:05d}"
# Where the words of the site that belong to the window are put into a question.
SITE = "{site}"


@dataclasses.dataclass(frozen=True)
class StudyQuestion:
    """How a study is asked; every field changes the answer."""

    conditioning: Conditions = "auto"
    # A name of the checkpoint's windows, "own", "percentile", or (low, high); None: what it saw of such.
    window: str | tuple[float, float] | None = None
    # Keep so many connected parts of a mask, the largest ones.
    parts: int | None = None
    # Leave out connected parts of less volume, ml.
    smallest_ml: float | None = None
    # Empty masks, slice by slice, whose object score is not above 0.
    hide_absent: bool = False
    # Longest answer, tokens.
    max_new_tokens: int = 256
    # Stop an answer with so many masks.
    max_masks: int | None = None


class Answerer(Protocol):
    """What is needed of `UniBiomed`."""

    config: ModelConfig
    params: Any
    stages: Stages
    precision: Precision
    checkpoint_hash: str

    def open(self, image: Image.Image) -> OpenedImage: ...

    def predict_batch(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        max_masks: int | None,
        hide_absent: bool,
    ) -> list[Answer]: ...

    def say(
        self, request: Request, *, max_new_tokens: int, max_masks: int | None
    ) -> tuple[str, np.ndarray]: ...


@dataclasses.dataclass
class _Asking:
    """A question that is being answered."""

    model: Answerer
    study: Study
    prompt: str
    question: StudyQuestion
    window: Window | None
    view: View
    kept: Kept
    progress: Progress
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    @property
    def slices(self) -> int:
        return len(self.study.values)

    def frame(self, index: int) -> Image.Image:
        """A slice as the checkpoint knows it."""
        truncate = self.model.config.preprocessing.truncate
        if self.window is None:
            pixels = self.study.values[index]
        else:
            pixels = to_grey(self.study, self.window, truncate=truncate, index=index)
        return Image.fromarray(np.ascontiguousarray(self.view.show(pixels))).convert("RGB")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin


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
    _check(question, study)
    window, prompt, notes = _shown(study, prompt, preprocessing, question)
    view = find_view(study, preprocessing)
    require_inverse(view)
    request, study_hash = request_of(model, study, prompt, question), hash_of(study)
    kept = Kept(state, {"request": request, "checkpoint": model.checkpoint_hash, "study": study_hash})
    asking = _Asking(model, study, prompt, question, window, view, kept, progress or (lambda *_: None))

    conditioning = _condition(asking, batch_size)
    if conditioning.choice == "each":
        name = FIRST
        text, names = _joined(asking)
        if asking.slices > 1:
            notes.append("every slice had an answer of its own; the text is the one of the likeliest slice")
    else:
        name = FOLLOWED
        text, names = _follow(asking, conditioning.slices)
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


def request_of(model: Answerer, study: Study, prompt: str, question: StudyQuestion) -> dict:
    """Everything that an answer depends on beside weights and study, JSON-ready.

    Raises:
        InputError: nothing says how the study is to be shown.
    """
    preprocessing = model.config.preprocessing
    window, prompt, _ = _shown(study, prompt, preprocessing, question)
    choice = question.conditioning
    asked = vars(question) | {
        "conditioning": choice if isinstance(choice, str) else [int(index) for index in choice],
        "window": None if window is None else _described(window),
    }
    request = {
        "prompt": prompt,
        **asked,
        "view": dataclasses.asdict(find_view(study, preprocessing)),
        "preprocessing": to_dict(preprocessing),
        "precision": to_dict(model.precision),
        "version": version("unibiomed-jax"),
    }
    return json.loads(json.dumps(request))  # equal to what a record of it says


def _described(window: Window) -> dict:
    """A window, JSON-ready."""
    table = None if window.table is None else hashlib.sha256(np.ascontiguousarray(window.table)).hexdigest()
    ends = {"low": float(window.low), "high": float(window.high)}
    return ends | {"from": window.origin, "curve": window.curve, "table": table}


def hash_of(study: Study) -> str:
    """sha256 of the values of a study and of where they lie."""
    about = (study.values.shape, str(study.values.dtype), study.modality, study.unit, study.white_is_low)
    digest = hashlib.sha256(repr(about).encode())
    for index, values in enumerate(study.values):
        digest.update(np.ascontiguousarray(values))
        if study.padding is not None:
            digest.update(np.packbits(study.padding[index]))
    if study.geometry is not None:
        for place in (study.geometry.origins, study.geometry.across, study.geometry.down):
            digest.update(np.ascontiguousarray(place))
    return digest.hexdigest()


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


def _check(question: StudyQuestion, study: Study) -> None:
    """Refuse what cannot be done before anything is computed."""
    if question.parts is not None and question.parts < 1:
        raise InputError(f"parts is {question.parts}; keep at least one connected part, or leave it out.")
    if question.smallest_ml is not None:
        if not question.smallest_ml > 0:
            raise InputError(
                f"smallest_ml is {question.smallest_ml}; give a volume above 0, or leave it out."
            )
        if study.geometry is None or len(study.geometry.uneven):
            raise InputError(
                f"The volume of a part of {study.series_alias} is not known, for its pixels have no size or "
                "its slices no even distance; leave smallest_ml out."
            )


def _shown(
    study: Study, prompt: str, preprocessing: Preprocessing, question: StudyQuestion
) -> tuple[Window | None, str, list[str]]:
    """The window of a study, the question with the words of its site, and what is odd about it."""
    window = None if study.is_colour else choose_window(study, preprocessing, question.window)
    preset = preprocessing.ct_window("" if window is None else window.origin.removeprefix("preset "))
    wording = "" if preset is None else preset.wording
    if SITE in prompt:
        if not wording:
            raise InputError(
                f"No words belong to the window {'of colours' if window is None else window}; write the site "
                f"into the question instead of {SITE}."
            )
        return window, prompt.replace(SITE, wording), []
    if wording and wording.lower() not in prompt.lower():
        return window, prompt, [f"in training, questions about this window named the site: {wording!r}"]
    return window, prompt, []


def _condition(asking: _Asking, batch_size: int) -> Conditioning:
    """Which slices the language model is shown."""
    choice, limit = asking.question.conditioning, asking.model.config.sam2.max_conditioning_frames
    everything = tuple(range(asking.slices))
    if isinstance(choice, str):
        if choice not in ("auto", "first", "each"):
            raise InputError(f"There is no conditioning {choice!r}; give auto, first, each or slices.")
    else:
        plan_frames(asking.slices, asking.model.config.sam2, choice)
    if choice == "each" or asking.slices == 1:
        _first_pass(asking, batch_size)
        reason = "every slice was asked by itself" if asking.slices > 1 else "there is only one slice"
        return Conditioning("each", everything, reason)
    if choice == "first":
        return Conditioning("first", everything[:limit], "the first ones, as the reference takes them")
    if choice != "auto":
        return Conditioning("stated", tuple(sorted(map(int, choice))), "as stated")
    presence, agreement = _first_pass(asking, batch_size)
    chosen = choose_slices(presence, agreement, limit)
    reason = (
        f"of {asking.slices} slices asked one by one, these show the target most surely (presence times "
        "agreement with the neighbours) and are spread over it"
    )
    return Conditioning("auto", chosen, reason, tuple(presence), tuple(agreement))


def _first_pass(asking: _Asking, batch_size: int) -> tuple[list[float], list[float]]:
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
                **_packed(asking, [segment.mask for segment in found]),
                ious=np.array([segment.iou for segment in found]),
                scores=np.array([segment.object_score for segment in found]),
            )
        done += len(group)
        asking.progress("first pass", done, asking.slices)
    presence, marked = [], []
    for index in range(asking.slices):
        found = _found(asking, FIRST, index)
        seen = found["scores"][found["masks"].any(1)]
        presence.append(float(1 / (1 + np.exp(-seen.max()))) if len(seen) else 0.0)
        marked.append(np.bitwise_or.reduce(found["masks"], axis=0))
    return presence, _agreement(marked)


def _agreement(marked: Sequence[Bool[np.ndarray, " bytes"]]) -> list[float]:
    """Of each slice, bits of whose pixels are given, the mean Dice with its neighbours; 1 if it is alone."""

    def dice(one: np.ndarray, other: np.ndarray) -> float:
        both, total = (int(np.bitwise_count(bits).sum()) for bits in (one & other, np.r_[one, other]))
        return 2 * both / total if total else 0.0

    pairs = [dice(*pair) for pair in itertools.pairwise(marked)]
    sides = zip([None, *pairs], [*pairs, None], strict=True)
    return [float(np.mean([side for side in two if side is not None] or [1.0])) for two in sides]


def _joined(asking: _Asking) -> tuple[str, list[str]]:
    """Of answers slice by slice the words of the one with the highest score, and the names of all."""
    text, best, names = "", -np.inf, {}
    for index in range(asking.slices):
        found = _found(asking, FIRST, index)
        names |= dict.fromkeys(found["names"].tolist())
        score = max(found["scores"], default=-np.inf)
        if not text or score > best:
            text, best = str(found["text"]), score
    return text, list(names)


def _follow(asking: _Asking, chosen: Sequence[int]) -> tuple[str, list[str]]:
    """Show the language model the chosen slices, segment them, and follow what it names to all the others.

    The steps are those of `UniBiomed.predict` on an opened volume, one slice in memory at a time.
    """
    model, question, kept = asking.model, asking.question, asking.kept
    config, size = model.config.sam2, model.config.sam2.image_size
    said = kept.get("said")
    if said is None:
        with asking.timed("words"):
            frames = [asking.frame(index) for index in chosen]
            tiles = frame_tiles(frames, tile_size=model.config.vision.image_size)
            volume = OpenedImage(frames, (), tiles, range(len(frames)))
            prompt = asking.prompt if IMAGE in asking.prompt else f"{IMAGE}{asking.prompt}"
            text, states = model.say(
                Request(prompt, volume),
                max_new_tokens=question.max_new_tokens,
                max_masks=question.max_masks,
            )
        said = {"text": np.array(text), "states": states}
        kept.put("said", **said)
    text, states = str(said["text"]), said["states"]
    names = distinct([phrase.text for phrase in parse_answer(text, asking.prompt)][: len(states)])
    if not len(states):
        return text.strip(), []

    count = len(states)
    states = np.concatenate([states, np.repeat(states[:1], power_of_two(count) - count, axis=0)])
    plan = plan_frames(asking.slices, config, chosen)
    prompted = FramePlan(*(values[: config.max_conditioning_frames] for values in plan))
    steps = np.flatnonzero(plan.valid).tolist()
    track = model.stages.empty_track(model.params, objects=len(states))
    start, track = _restored(kept, track, [int(plan.index[step]) for step in steps])
    last_kept = time.monotonic()
    for done, step in enumerate(steps):
        if done < start:
            continue
        asking.progress("following", done, asking.slices)
        index = int(plan.index[step])
        with asking.timed("following"):
            frame = sam_image(asking.frame(index), size)[None]
            place = (np.int32(step), plan.index[step], plan.direction[step])
            track, masks = model.stages.segment_step(model.params, track, frame, states, prompted, *place)
            masks = jax.device_get(masks)
        with asking.timed("resize masks"):
            scores = masks.object_scores[:count]
            shape = asking.view.shape
            full = [upscale_masks(low, shape, size) > 0 for low in masks.masks[:count]]
            if question.hide_absent:
                full = [mask & bool(score > 0) for mask, score in zip(full, scores, strict=True)]
            kept.put(
                FOLLOWED.format(index),
                names=np.array(names, str),
                **_packed(asking, full),
                ious=masks.ious[:count].max(-1),
                scores=scores,
            )
        if time.monotonic() - last_kept > KEEP_EVERY:
            leaves = (np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in jax.device_get(track))
            kept.put("track", done=np.array(done + 1), **dict(zip(TrackState._fields, leaves, strict=True)))
            last_kept = time.monotonic()
    asking.progress("following", asking.slices, asking.slices)
    return text.strip(), list(names)


def _restored(kept: Kept, blank: TrackState, order: Sequence[int]) -> tuple[int, TrackState]:
    """How many steps were done, and what is remembered of them; none if a slice of them is lost.

    `order`: the slice of each step.
    """
    found = kept.get("track")
    if found is None:
        return 0, blank
    done = int(found["done"])
    if any(kept.get(FOLLOWED.format(index)) is None for index in order[:done]):
        return 0, blank
    leaves = (found[name].view(leaf.dtype).reshape(leaf.shape) for name, leaf in blank._asdict().items())
    return done, TrackState(*leaves)


def _packed(asking: _Asking, masks: Sequence[Bool[np.ndarray, "rows columns"]]) -> dict[str, np.ndarray]:
    """Masks of the view on the stored slice, a bit a pixel."""
    stored = [np.packbits(asking.view.restore(mask)) for mask in masks]
    pixels = asking.view.rows * asking.view.columns
    return {"masks": np.array(stored, np.uint8).reshape(len(stored), -(-pixels // 8))}


def _found(asking: _Asking, name: str, index: int) -> dict[str, np.ndarray]:
    found = asking.kept.get(name.format(index))
    if found is None:
        raise InputError("What was half done is damaged; run the same command again.")
    return found


def _segments(
    asking: _Asking, names: Sequence[str], name: str
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
            found = _found(asking, name, index)
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
