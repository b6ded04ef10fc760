"""Decoding as a compiled while-loop: greedy, or drawn at a temperature.

The reference stops when the decoded *text* ends with the stop string, which only the host can see. The loop
therefore pauses when a row says the last token of the stop string (or after `limit` tokens); the host then
looks at the text and resumes. Any overshoot is exact: it is cut off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from unibiomed_jax.models.mask_decoder import MaskDecoding
from unibiomed_jax.models.sam2 import FrameMasks, FramePlan, ImageFeatures
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.sharding.constraints import constrain


class Draw(NamedTuple):
    """How tokens are drawn; without it the likeliest is taken.

    Every row of a batch is drawn as if it were alone: random numbers depend on the seed and on the step.
    """

    # Logits are divided by it.
    temperature: Float[Array | np.floating, ""]
    # Only the likeliest tokens that have this much probability together are drawn from (Holtzman et al.
    # 2020, arXiv 1904.09751); None: from all, without sorting them.
    top_p: Float[Array | np.floating, ""] | None
    seed: Int[Array | np.integer, ""]


class Limits(NamedTuple):
    """Where a row ends at the latest."""

    # Tokens that it may say.
    tokens: Int[Array | np.ndarray, "batch"]
    # [SEG] after which it stops, one token later: the state at a [SEG] is known with the next token.
    segs: Int[Array | np.ndarray, "batch"]


class Decoding(NamedTuple):
    """Everything a paused generation needs to go on."""

    # Key-value cache of the language model.
    cache: Any
    # Prompt length of every row.
    lengths: Int[Array, "batch"]
    # Tokens said so far; column t is valid when t < step.
    ids: Int[Array, "batch new"]
    # Final-norm hidden state at the position where ids[:, t] is the input; valid when t < step - 1.
    hidden: Float[Array, "batch new embed"]
    # Number of tokens said.
    step: Int[Array, ""]
    # Tokens to say whatever the model prefers; -1 leaves the choice to the model.
    forced: Int[Array, "batch new"]
    limits: Limits
    draw: Draw | None


def prefill(
    model: UniBiomedModel,
    ids: Int[Array, "batch length"],
    source: Int[Array, "batch length"],
    lengths: Int[Array, "batch"],
    visual: Float[Array, "batch rows embed"],
    forced: Int[Array, "batch new"],
    limits: Limits,
    draw: Draw | None = None,
) -> Decoding:
    """Read the prompts (right-padded; `lengths` says where they end) and say the first token."""
    language_model = model.language_model
    batch, new = forced.shape
    embeds = model.embed_prompt(ids, visual, source)
    cache = language_model.init_cache(batch, ids.shape[1] + new, embeds.dtype)
    hidden, cache = language_model.prefill(embeds, lengths, cache)
    first = _choose(language_model.logits(hidden), forced[:, 0], 0, draw)
    return Decoding(
        cache=cache,
        lengths=lengths,
        ids=jnp.zeros((batch, new), jnp.int32).at[:, 0].set(first),
        hidden=jnp.zeros((batch, new, hidden.shape[-1]), hidden.dtype),
        step=jnp.asarray(1, jnp.int32),
        forced=forced,
        limits=limits,
        draw=draw,
    )


def blank_rows(model: UniBiomedModel, batch: int, length: int) -> Float[Array, "batch length embed"]:
    """Room for the visual rows of a batch, which `lay_tile` fills."""
    rows = jnp.zeros((batch, length, model.config.language.hidden_size))
    return constrain(rows, "batch", None, None)


def lay_tile(
    visual: Float[Array, "batch length embed"],
    rows: Float[Array, "tiles grid grid embed"],
    tile: Int[Array, ""],
    row: Int[Array, ""],
    number: Int[Array, ""],
) -> Float[Array, "batch length embed"]:
    """Lay the rows of one of the `tiles` where those of tile `number` of a row of the batch belong."""
    part = jax.lax.dynamic_index_in_dim(rows, tile).reshape(1, -1, rows.shape[-1]).astype(visual.dtype)
    visual = jax.lax.dynamic_update_slice(visual, part, (row, number * part.shape[1], 0))
    return constrain(visual, "batch", None, None)


def states_at(
    hidden: Float[Array, "batch new embed"], rows: Int[Array, "objects"], places: Int[Array, "objects"]
) -> Float[Array, "objects embed"]:
    """The states at some places of some answers."""
    return hidden[rows, places]


def segment_image(
    model: UniBiomedModel, features: ImageFeatures, hidden: Float[Array, "objects embed"]
) -> MaskDecoding:
    """Masks of one image for some states."""
    return model.segment(features, hidden[None])


class StopText(NamedTuple):
    """The stop string as ids, as far as a device can tell: a token whose text ends as the string begins, then
    the rest of it. Another cut of the string into tokens is left to the host.
    """

    # Whether the text of a token ends with the first character of the stop string.
    begins: Bool[Array, "vocab"]
    # The ids of the other characters.
    rest: Int[Array, "rest"]


def advance(
    model: UniBiomedModel,
    state: Decoding,
    done: Bool[Array, "batch"],
    limit: Int[Array, ""],
    stop: StopText | None = None,
    *,
    end_id: int,
    seg_id: int,
    pause_id: int = -1,
) -> Decoding:
    """Say up to `limit` more tokens, without a host round trip between them.

    Stops early when every row is done, has said `end_id` or the stop text or reached its limits, and when a
    row that is not done says `pause_id`.
    """
    language_model = model.language_model
    new = state.ids.shape[1]
    last = jnp.minimum(state.step + limit, new)

    def going(loop):
        state, done, paused = loop
        return (state.step < last) & ~jnp.all(done) & ~paused

    def say(loop):
        state, done, _ = loop
        spoken = jax.lax.dynamic_index_in_dim(state.ids, state.step - 1, axis=1, keepdims=True)
        embeds = language_model.embed(spoken).astype(model.precision.language)
        hidden, cache = language_model.decode_step(embeds, state.lengths + state.step - 1, state.cache)
        forced = jax.lax.dynamic_index_in_dim(state.forced, state.step, axis=1, keepdims=False)
        token = _choose(language_model.logits(hidden), forced, state.step, state.draw)
        state = state._replace(
            cache=cache,
            ids=jax.lax.dynamic_update_index_in_dim(state.ids, token, state.step, axis=1),
            hidden=jax.lax.dynamic_update_index_in_dim(state.hidden, hidden, state.step - 1, axis=1),
            step=state.step + 1,
        )
        paused = jnp.any((token == pause_id) & ~done)
        return state, done | _ended(state, end_id, stop)[:, 0] | _full(state, seg_id), paused

    done = done | jnp.any((state.ids == end_id) & (jnp.arange(new) < state.step), axis=1)
    done = done | _full(state, seg_id)
    return jax.lax.while_loop(going, say, (state, done, jnp.asarray(False)))[0]


class Grounding(NamedTuple):
    """What the whole model says about a batch of images, volumes or words."""

    # Tokens said; column t of a row is valid when t < count.
    ids: Int[Array, "batch new"]
    # Tokens of a row up to its end, that included.
    count: Int[Array, " batch"]
    # State at each of the first `objects` [SEG] of a row, and whether there is one.
    hidden: Float[Array, "batch objects embed"]
    valid: Bool[Array, "batch objects"]
    # The mask of each of them in every frame; none of words alone.
    masks: FrameMasks | None


def ground(
    model: UniBiomedModel,
    tiles: UInt8[Array, "batch tiles side side 3"],
    ids: Int[Array, "batch length"],
    source: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    frames: UInt8[Array, "batch frames size size 3"],
    forced: Int[Array, "batch new"],
    limits: Limits,
    draw: Draw | None = None,
    stop: StopText | None = None,
    plan: FramePlan | None = None,
    *,
    objects: int,
    end_id: int,
    seg_id: int,
) -> Grounding:
    """Pixels and tokens to words, [SEG] states and masks: all of the model as one function.

    This is what is divided over devices and exported: fixed shapes, one call, no host in between. The staged
    way (`UniBiomed.predict_batch`) says the same with less work where answers are short and masks few.

    Args:
        tiles: what the language model sees of each image or frame; none for words alone.
        source: which row of an image's tiles, one after the other, takes the place of a token; -1: none.
        frames: what SAM2 sees of each image: one frame, or those of a volume; none for words alone.
        stop: ends a row at the stop text; where ids alone do not show it, the host cuts the answer.
        plan: of volumes, with a leading batch axis: in which order frames are segmented.
        objects: how many masks an answer has room for.

    See `prefill` for the other arguments.
    """
    batch, new = forced.shape
    visual = jnp.zeros((batch, 1, model.config.language.hidden_size))
    if tiles.shape[1]:
        visual = model.visual_rows(tiles)
    state = prefill(model, ids, source, lengths, visual, forced, limits, draw)
    nobody = jnp.zeros(batch, bool)
    state = advance(model, state, nobody, jnp.asarray(new), stop, end_id=end_id, seg_id=seg_id)

    steps = jnp.arange(new)
    ended = _ended(state, end_id, stop, every_step=True) & (steps < state.step)
    count = jnp.where(ended.any(1), jnp.argmax(ended, axis=1) + 1, state.step)
    count = jnp.minimum(count, limits.tokens)
    is_seg = (state.ids == seg_id) & (steps < count[:, None] - 1)
    places = jax.vmap(lambda row: jnp.nonzero(row, size=objects, fill_value=0)[0])(is_seg)
    hidden = jnp.take_along_axis(state.hidden, places[..., None], axis=1)
    valid = jnp.arange(objects) < is_seg.sum(1, keepdims=True)

    masks = None
    if plan is not None:
        masks = jax.lax.map(lambda inputs: model.segment_frames(*inputs), (frames, hidden, plan))
    elif frames.shape[1]:
        decoded = model.segment(model.encode_image(frames[:, 0]), hidden)
        found = FrameMasks(decoded.masks, decoded.ious, decoded.object_scores)
        masks = jax.tree.map(lambda values: values[:, None], found)
    return Grounding(state.ids, count, hidden, valid, masks)


def _ended(
    state: Decoding, end_id: int, stop: StopText | None, *, every_step: bool = False
) -> Bool[Array, "batch steps"]:
    """Whether a row ends with its newest token; `every_step`: with each of its tokens."""
    size = 0 if stop is None else len(stop.rest)
    ids = jnp.pad(state.ids, ((0, 0), (size, 0)), constant_values=-1)
    if not every_step:
        ids = jax.lax.dynamic_slice_in_dim(ids, state.step - 1, size + 1, axis=1)
    steps = ids.shape[1] - size
    ended = ids[:, size:] == end_id
    if stop is None:
        return ended
    first = ids[:, :steps]
    spelled = (first >= 0) & stop.begins[jnp.maximum(first, 0)]
    for place in range(size):
        spelled &= ids[:, 1 + place : 1 + place + steps] == stop.rest[place]
    return ended | spelled


def _full(state: Decoding, seg_id: int) -> Bool[Array, " batch"]:
    """Whether a row has reached one of its limits."""
    known = (state.ids == seg_id) & (jnp.arange(state.ids.shape[1]) < state.step - 1)
    return (state.step >= state.limits.tokens) | (known.sum(1) >= state.limits.segs)


def _choose(
    logits: Float[Array, "batch vocab"],
    forced: Int[Array, " batch"],
    step: Int[Array, ""] | int,
    draw: Draw | None,
) -> Int[Array, " batch"]:
    """The next token of every row."""
    if draw is not None:
        # Differences to the likeliest, which no temperature can make infinite minus infinite.
        logits = logits - logits.max(axis=-1, keepdims=True)
        logits = logits / draw.temperature
        if draw.top_p is not None:
            logits = likeliest(logits, draw.top_p)
        key = jax.random.fold_in(jax.random.key(draw.seed), step)
        logits = logits + jax.random.gumbel(key, logits.shape[-1:])
    return jnp.where(forced >= 0, forced, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def likeliest(logits: Float[Array, "batch vocab"], top_p: Float[Array, ""]) -> Float[Array, "batch vocab"]:
    """The logits, -inf but for the fewest likeliest tokens whose probabilities sum to `top_p` or more."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < top_p).at[..., 0].set(True)  # whatever top_p is rounded to
    least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    least = jnp.where(top_p < 1, least, -jnp.inf)  # rounded to 1, as rounded sums are before the end
    return jnp.where(logits >= least, logits, -jnp.inf)
