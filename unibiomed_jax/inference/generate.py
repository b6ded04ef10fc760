"""Greedy decoding as a compiled while-loop.

The reference stops when the decoded *text* ends with the stop string, which only the host can see. The loop
therefore pauses when a row says the last token of the stop string (or after `limit` tokens); the host then
looks at the text and resumes. Greedy decoding makes any overshoot exact: it is cut off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unibiomed_jax.models.mask_decoder import MaskDecoding
from unibiomed_jax.models.unibiomed import UniBiomedModel


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


def start(
    model: UniBiomedModel,
    ids: Int[Array, "batch length"],
    source: Int[Array, "batch length"],
    lengths: Int[Array, "batch"],
    visual: Float[Array, "rows embed"],
    forced: Int[Array, "batch new"],
) -> Decoding:
    """Read the prompts (right-padded; `lengths` says where they end) and say the first token."""
    language_model = model.language_model
    batch, new = forced.shape
    embeds = model.embed_prompt(ids, visual, source)
    cache = language_model.init_cache(batch, ids.shape[1] + new, embeds.dtype)
    hidden, cache = language_model.prefill(embeds, lengths, cache)
    first = _choose(language_model.logits(hidden), forced[:, 0])
    return Decoding(
        cache=cache,
        lengths=lengths,
        ids=jnp.zeros((batch, new), jnp.int32).at[:, 0].set(first),
        hidden=jnp.zeros((batch, new, hidden.shape[-1]), hidden.dtype),
        step=jnp.asarray(1, jnp.int32),
        forced=forced,
    )


def advance(
    model: UniBiomedModel,
    state: Decoding,
    done: Bool[Array, "batch"],
    limit: Int[Array, ""],
    *,
    end_id: int,
    pause_id: int,
) -> Decoding:
    """Say up to `limit` more tokens, without a host round trip between them.

    Stops early when every row is done or has said `end_id`, and when a row that is not done says `pause_id`.
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
        embeds = language_model.embed(spoken).astype(model.config.precision.language)
        hidden, cache = language_model.decode_step(embeds, state.lengths + state.step - 1, state.cache)
        forced = jax.lax.dynamic_index_in_dim(state.forced, state.step, axis=1, keepdims=False)
        token = _choose(language_model.logits(hidden), forced)
        state = state._replace(
            cache=cache,
            ids=jax.lax.dynamic_update_index_in_dim(state.ids, token, state.step, axis=1),
            hidden=jax.lax.dynamic_update_index_in_dim(state.hidden, hidden, state.step - 1, axis=1),
            step=state.step + 1,
        )
        paused = jnp.any((token == pause_id) & ~done)
        return state, done | (token == end_id), paused

    done = done | jnp.any((state.ids == end_id) & (jnp.arange(new) < state.step), axis=1)
    return jax.lax.while_loop(going, say, (state, done, jnp.asarray(False)))[0]


class Grounding(NamedTuple):
    """What the whole model says about a batch of images."""

    # Tokens said; column t of a row is valid when t < count.
    ids: Int[Array, "batch new"]
    # Tokens of a row up to its end token, that included.
    count: Int[Array, " batch"]
    # State at each of the first `objects` [SEG] of a row, and whether there is one.
    hidden: Float[Array, "batch objects embed"]
    valid: Bool[Array, "batch objects"]
    # The mask of each of them.
    masks: MaskDecoding


def ground(
    model: UniBiomedModel,
    tiles: Float[Array, "tiles side side 3"],
    ids: Int[Array, "batch length"],
    source: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    images: Float[Array, "batch size size 3"],
    forced: Int[Array, "batch new"],
    *,
    objects: int,
    end_id: int,
    seg_id: int,
) -> Grounding:
    """Pixels and tokens to words, [SEG] states and masks: all of the model as one function to jit and shard.

    The predictor runs the same stages one by one, because only the host can see the stop text and because
    most answers need fewer tokens and masks than a fixed shape has room for. `source` indexes the rows of all
    tiles, (tiles * tokens); see `start` for the other arguments.
    """
    new = forced.shape[1]
    visual = model.encode_tiles(tiles)
    state = start(model, ids, source, lengths, visual.reshape(-1, visual.shape[-1]), forced)
    nobody = jnp.zeros(len(ids), bool)
    state = advance(model, state, nobody, jnp.asarray(new), end_id=end_id, pause_id=-1)

    steps = jnp.arange(new)
    ended = (state.ids == end_id) & (steps < state.step)
    count = jnp.where(ended.any(1), jnp.argmax(ended, axis=1) + 1, state.step)
    is_seg = (state.ids == seg_id) & (steps < count[:, None] - 1)
    places = jax.vmap(lambda row: jnp.nonzero(row, size=objects, fill_value=0)[0])(is_seg)
    hidden = jnp.take_along_axis(state.hidden, places[..., None], axis=1)
    valid = jnp.arange(objects) < is_seg.sum(1, keepdims=True)
    return Grounding(state.ids, count, hidden, valid, model.segment(model.encode_image(images), hidden))


def _choose(logits: Float[Array, "batch vocab"], forced: Int[Array, "batch"]) -> Int[Array, "batch"]:
    return jnp.where(forced >= 0, forced, jnp.argmax(logits, axis=-1).astype(jnp.int32))
