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


def _choose(logits: Float[Array, "batch vocab"], forced: Int[Array, "batch"]) -> Int[Array, "batch"]:
    return jnp.where(forced >= 0, forced, jnp.argmax(logits, axis=-1).astype(jnp.int32))
