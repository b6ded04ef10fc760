"""The language model's words about some slices of a study, and what they name followed to all the others."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np

from unibiomed_jax.inference.answer import OpenedImage, Request
from unibiomed_jax.inference.buckets import power_of_two
from unibiomed_jax.inference.kept import Kept
from unibiomed_jax.inference.phrases import parse_answer
from unibiomed_jax.inference.study_answer import distinct
from unibiomed_jax.inference.study_run import FOLLOWED, Asking
from unibiomed_jax.inputs.prompt import IMAGE
from unibiomed_jax.inputs.tiles import frame_tiles, sam_image
from unibiomed_jax.masks.resize import upscale_masks
from unibiomed_jax.models.sam2 import FramePlan, TrackState, plan_frames

# Seconds between two states of the tracking that are kept.
KEEP_EVERY = 20.0


def follow(asking: Asking, chosen: Sequence[int]) -> tuple[str, list[str]]:
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
                **asking.packed(full),
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
