"""Qwen2.5: a decoder with grouped-query attention, rotary positions and a gated MLP (arXiv 2412.15115).

Prompts of a batch are padded on the right. Decoding writes the next token of a row right behind the row's own
prompt, over the padding, so that "a slot up to my position" is all the masking there is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.models.attention import attention, decode_attention
from unibiomed_jax.models.layers import LINEAR_INIT, Linear, RMSNorm, matmul, scan_layers, stack_layers
from unibiomed_jax.models.ops import apply_rope, rope_table
from unibiomed_jax.sharding.constraints import by_share, constrain

# Where the blocks lie in the model.
LAYERS = "language_model.layers"

# What the first axes of queries and of what attention gives them mean.
HEADS = ("batch", "language.tokens", "language.heads")

# Keys or values of all layers.
Slots = Float[Array, "layers batch kv_heads slots head_dim"]

# {"k": keys, "v": values}
Cache = dict[str, Slots]

# (cosine, sine), each (batch, tokens, head_dim).
Rope = tuple[Float[Array, "batch tokens head_dim"], Float[Array, "batch tokens head_dim"]]


def write_prompt(
    slots: Slots, layer: int | Array, new: Float[Array, "batch tokens kv_heads head_dim"]
) -> Slots:
    """Put the keys (or values) of whole prompts into the first slots of a layer."""
    new = new.swapaxes(1, 2)[None].astype(slots.dtype)
    return jax.lax.dynamic_update_slice(slots, new, (layer, 0, 0, 0, 0))


def write_token(
    slots: Slots,
    layer: int | Array,
    new: Float[Array, "batch 1 kv_heads head_dim"],
    positions: Int[Array, " batch"],
) -> Slots:
    """Put the key (or value) of one token a row into the slot `positions[row]` of a layer."""
    new = new.swapaxes(1, 2).astype(slots.dtype)
    for row in range(new.shape[0]):
        start = (layer, row, 0, positions[row], 0)
        slots = jax.lax.dynamic_update_slice(slots, new[None, row : row + 1], start)
    return slots


def projection_key(key: Array | None, index: int) -> Array | None:
    """A key of its own for the adapter dropout of each projection of a block."""
    return None if key is None else jax.random.fold_in(key, index)


class SelfAttention(nnx.Module):
    """Grouped-query attention; queries, keys and values have biases, the output projection has none."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(width, config.num_heads * head_dim, rngs=rngs)
        self.k_proj = Linear(width, config.num_kv_heads * head_dim, rngs=rngs)
        self.v_proj = Linear(width, config.num_kv_heads * head_dim, rngs=rngs)
        self.o_proj = Linear(config.num_heads * head_dim, width, use_bias=False, rngs=rngs)
        self.head_dim = head_dim

    def project(
        self, x: Float[Array, "batch tokens width"], rope: Rope, key: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Rotated queries, rotated keys and values, each (batch, tokens, heads, head_dim)."""
        q, k, v = (
            layer(x, projection_key(key, i)).reshape(*x.shape[:2], -1, self.head_dim)
            for i, layer in enumerate((self.q_proj, self.k_proj, self.v_proj))
        )
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q = constrain(q, *HEADS, None)
        # Every query looks at the keys of all tokens.
        k, v = (constrain(x, "batch", None, "language.kv_heads", None) for x in (k, v))
        return q, k, v

    def output(
        self, heads: Float[Array, "batch tokens heads head_dim"], key: Array | None = None
    ) -> Float[Array, "batch tokens width"]:
        return self.o_proj(heads.reshape(*heads.shape[:2], -1), projection_key(key, 3))


class GatedMLP(nnx.Module):
    """down(SiLU(gate(x)) * up(x)), without biases (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.mlp_dim
        self.gate_proj = Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up_proj = Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down_proj = Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], key: Array | None = None
    ) -> Float[Array, "batch tokens width"]:
        gate = self.gate_proj(x, projection_key(key, 4)).astype(jnp.float32)
        up = self.up_proj(x, projection_key(key, 5))
        hidden = constrain(jax.nn.silu(gate).astype(x.dtype) * up, "batch", "language.tokens", "language.mlp")
        return self.down_proj(hidden, projection_key(key, 6))


class DecoderBlock(nnx.Module):
    """Pre-norm block; attention is handed in, since it is all that differs between training and decoding."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "batch tokens width"], rope: Rope, attend, key: Array | None = None):
        """Return the block's output and the `extra` that `attend(q, k, v) -> (heads, extra)` returned."""
        x = constrain(x, "batch", "language.tokens", None)
        q, k, v = self.self_attn.project(self.input_layernorm(x), rope, key)
        heads, extra = attend(q, k, v)
        heads = constrain(heads, *HEADS, None)
        x = x + self.self_attn.output(heads, key)
        return x + self.mlp(self.post_attention_layernorm(x), key), extra


class Qwen2(nnx.Module):
    """The decoder with its embedding table and output head."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs):
        rows, width = config.padded_vocab_size, config.hidden_size
        self.embed_tokens = nnx.Param(LINEAR_INIT(rngs.params(), (rows, width), jnp.float32))
        self.layers = stack_layers(lambda r: DecoderBlock(config, rngs=r), config.num_layers, rngs)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(width, rows, use_bias=False, rngs=rngs)
        self.config = config

    def embed(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Rows of the embedding table, in the table's dtype."""
        return by_share(
            lambda table, ids: table[ids],
            "language_model.embed_tokens",
            self.embed_tokens[...],
            ids,
            meanings=("batch", "language.tokens"),
        )

    def head(self) -> Float[Array, "width padded_vocab"]:
        """What turns hidden states into scores, in its stored dtype; columns of padding included."""
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Scores of the true vocabulary in float32, rounded to the dtype of `hidden` on the way.

        The rounding decides ties between tokens in bfloat16, where the reference rounds too.
        """
        if self.lm_head is None:
            scores = matmul(hidden, self.head().astype(hidden.dtype)).astype(hidden.dtype)
        else:
            scores = self.lm_head(hidden)
        return scores[..., : self.config.vocab_size].astype(jnp.float32)

    def __call__(
        self,
        embeds: Float[Array, "batch tokens width"],
        *,
        positions: Int[Array, "batch tokens"] | None = None,
        token_valid: Bool[Array, "batch tokens"] | None = None,
        remat: str = "none",
        lora_dropout_key: Array | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Hidden states after the final norm for whole sequences, as in training.

        Args:
            positions: rotary positions; 0, 1, 2, ... if not given.
            token_valid: False hides a token from all others. Padding on the right needs no such mask, since
                no token looks to its right.
            remat: what the backward pass recomputes: "none", "full" or "dots" (see `scan_layers`).
            lora_dropout_key: switches on the dropout of LoRA adapters.
        """
        rope = self._rope(jnp.arange(embeds.shape[1])[None] if positions is None else positions)
        keys = None
        if lora_dropout_key is not None:
            keys = jax.random.split(lora_dropout_key, self.config.num_layers)

        def attend(q, k, v):
            options = {"tower": "language", "axes": HEADS, "causal": True}
            return attention(q, k, v, key_valid=token_valid, **options), None

        def step(block, x, key):
            return block(x, rope, attend, key)

        x, _ = scan_layers(self.layers, step, embeds, keys, path=LAYERS, remat=remat)
        return constrain(self.norm(x), "batch", "language.tokens", None)

    def init_cache(self, batch: int, length: int, dtype=jnp.float32) -> Cache:
        """An empty cache with `length` slots a row: prompt and answer together."""
        config = self.config
        shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
        axes = (None, "batch", "language.kv_heads", None, None)
        return {name: constrain(jnp.zeros(shape, dtype), *axes) for name in ("k", "v")}

    def prefill(
        self, embeds: Float[Array, "batch tokens width"], lengths: Int[Array, " batch"], cache: Cache
    ) -> tuple[Float[Array, "batch width"], Cache]:
        """Read prompts padded on the right; `lengths` counts the valid tokens of each row, at least one.

        Returns:
            The final-norm hidden state of each row's last valid token, and the filled cache (slots of padding
            hold keys that no decoding step looks at before it overwrites them).
        """

        def attend(q, k, v, cache, layer):
            cache = {"k": write_prompt(cache["k"], layer, k), "v": write_prompt(cache["v"], layer, v)}
            return attention(q, k, v, tower="language", axes=HEADS, causal=True), cache

        x, cache = self._run_cached(embeds, jnp.arange(embeds.shape[1])[None], cache, attend)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.norm(last), cache

    def decode_step(
        self, embeds: Float[Array, "batch 1 width"], positions: Int[Array, " batch"], cache: Cache
    ) -> tuple[Float[Array, "batch width"], Cache]:
        """Read one more token a row into the slots `positions`: the row's prompt length plus the step.

        Returns:
            The final-norm hidden state of that token and the cache, updated in place under jit.
        """
        slots = jax.tree.leaves(cache)[0].shape[-2]
        visible = jnp.arange(slots) <= positions[:, None]

        def attend(q, k, v, cache, layer):
            # Without the barrier XLA merges the write into the reads below and copies the cache.
            cache = {
                "k": write_token(cache["k"], layer, k, positions),
                "v": write_token(cache["v"], layer, v, positions),
            }
            cache = jax.lax.optimization_barrier(cache)
            heads = decode_attention(q[:, 0], cache["k"][layer], cache["v"][layer], visible)
            return heads[:, None], cache

        x, cache = self._run_cached(embeds, positions[:, None], cache, attend)
        return self.norm(x[:, 0]), cache

    def _rope(self, positions: Int[Array, "batch tokens"]) -> Rope:
        return rope_table(positions, self.config.head_dim, self.config.rope_theta)

    def _run_cached(self, embeds, positions, cache, attend):
        """Run all blocks with the cache as part of the carry, which lets XLA update it in place."""
        rope = self._rope(positions)

        def step(block, carry, layer):
            x, cache = carry
            return block(x, rope, lambda q, k, v: attend(q, k, v, cache, layer)), None

        numbers = np.arange(self.config.num_layers)
        (x, cache), _ = scan_layers(self.layers, step, (embeds, cache), numbers, path=LAYERS)
        return x, cache
