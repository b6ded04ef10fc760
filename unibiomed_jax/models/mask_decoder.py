"""SAM2's mask decoder: a two-way transformer between a few prompt tokens and the image.

Every array has an image axis and an object axis. What depends on the image alone has an object axis of
length 1 and is computed once, however many objects are asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from unibiomed_jax.config.model import Sam2Config
from unibiomed_jax.models.attention import attention
from unibiomed_jax.models.layers import (
    LINEAR_INIT,
    MLP,
    Conv2d,
    LayerNorm,
    Linear,
    einsum,
    matmul,
    stack_layers,
)
from unibiomed_jax.models.ops import gelu
from unibiomed_jax.sharding.constraints import constrain, gathered

NUM_MASK_TOKENS = 4


class DecoderAttention(nnx.Module):
    """Multi-head attention whose inner width is the model's divided by `downsample`."""

    def __init__(self, dim: int, num_heads: int, *, downsample: int = 1, rngs: nnx.Rngs):
        inner = dim // downsample
        self.q_proj = Linear(dim, inner, rngs=rngs)
        self.k_proj = Linear(dim, inner, rngs=rngs)
        self.v_proj = Linear(dim, inner, rngs=rngs)
        self.out_proj = Linear(inner, dim, rngs=rngs)
        self.num_heads = num_heads

    def __call__(
        self,
        q: Float[Array, "images #objects queries dim"],
        k: Float[Array, "images #objects keys dim"],
        v: Float[Array, "images #objects keys dim"],
    ) -> Float[Array, "images objects queries dim"]:
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        objects = max(q.shape[1], k.shape[1])

        def split_heads(x):
            x = jnp.broadcast_to(x, (x.shape[0], objects, *x.shape[2:]))
            return rearrange(x, "b o n (h d) -> (b o) n h d", h=self.num_heads)

        heads = (split_heads(x) for x in (q, k, v))
        out = attention(*heads, tower="mask decoder", axes=("sam2.images", None, None))
        return self.out_proj(rearrange(out, "(b o) n h d -> b o n (h d)", o=objects))


class TwoWayLayer(nnx.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens; all post-norm."""

    def __init__(self, config: Sam2Config, *, first: bool, rngs: nnx.Rngs):
        dim, heads = config.d_model, config.decoder_heads
        self.self_attn = DecoderAttention(dim, heads, rngs=rngs)
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.cross_attn_token_to_image = DecoderAttention(dim, heads, downsample=2, rngs=rngs)
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.mlp = MLP((dim, config.decoder_mlp_dim, dim), jax.nn.relu, rngs=rngs)
        self.norm3 = LayerNorm(dim, eps=1e-5)
        self.norm4 = LayerNorm(dim, eps=1e-5)
        self.cross_attn_image_to_token = DecoderAttention(dim, heads, downsample=2, rngs=rngs)
        self.first = first

    def __call__(
        self,
        tokens: Float[Array, "images objects tokens dim"],
        image: Float[Array, "images #objects cells dim"],
        token_position: Float[Array, "images objects tokens dim"],
        image_position: Float[Array, "cells dim"],
    ) -> tuple[Float[Array, "images objects tokens dim"], Float[Array, "images objects cells dim"]]:
        if self.first:  # the first layer replaces the tokens: no position, no residual
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_position
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + image_position
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_position, placed_image, image)
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(placed_image, tokens + token_position, tokens)
        return tokens, self.norm4(image)


class TwoWayTransformer(nnx.Module):
    """Two layers and a last look of the tokens at the image. A token's position is its value at the start."""

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        self.layers = nnx.List([TwoWayLayer(config, first=first, rngs=rngs) for first in (True, False)])
        self.final_attn_token_to_image = DecoderAttention(
            config.d_model, config.decoder_heads, downsample=2, rngs=rngs
        )
        self.norm_final_attn = LayerNorm(config.d_model, eps=1e-5)

    def __call__(
        self,
        tokens: Float[Array, "images objects tokens dim"],
        image: Float[Array, "images 1 cells dim"],
        image_position: Float[Array, "cells dim"],
    ) -> tuple[Float[Array, "images objects tokens dim"], Float[Array, "images objects cells dim"]]:
        token_position = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_position, image_position)
        last_look = self.final_attn_token_to_image(tokens + token_position, image + image_position, image)
        return self.norm_final_attn(tokens + last_look), image


class Upscale(nnx.Module):
    """Double the grid: torch.nn.ConvTranspose2d with kernel and stride 2, whose outputs never overlap."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(LINEAR_INIT(rngs.params(), (in_features, 2, 2, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,)))

    def __call__(
        self, x: Float[Array, "*batch rows columns in"]
    ) -> Float[Array, "*batch 2*rows 2*columns out"]:
        kernel = self.kernel[...].astype(x.dtype)
        y = matmul(x, kernel.reshape(kernel.shape[0], -1)).astype(x.dtype)
        y = rearrange(y, "... r c (i j d) -> ... (r i) (c j) d", i=2, j=2)
        return y + self.bias[...].astype(x.dtype)


class MaskDecoding(NamedTuple):
    """What the mask decoder says about every object. All float32; g is the side of the feature map."""

    # Logits of the mask with the highest predicted IoU.
    masks: Float[Array, "images objects 4*g 4*g"]
    # Logits of all three candidates.
    multimasks: Float[Array, "images objects 3 4*g 4*g"]
    # Predicted IoU of the candidates.
    ious: Float[Array, "images objects 3"]
    # Logit of "the object is in the image".
    object_scores: Float[Array, "images objects"]
    # Token of the chosen candidate, from which the object pointer is made.
    mask_tokens: Float[Array, "images objects d_model"]


class MaskDecoder(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        dim = config.d_model
        self.iou_token = nnx.Param(LINEAR_INIT(rngs.params(), (1, dim)))
        self.obj_score_token = nnx.Param(LINEAR_INIT(rngs.params(), (1, dim)))
        self.mask_tokens = nnx.Param(LINEAR_INIT(rngs.params(), (NUM_MASK_TOKENS, dim)))
        self.transformer = TwoWayTransformer(config, rngs=rngs)
        self.conv_s0 = Conv2d(dim, dim // 8, 1, rngs=rngs)
        self.conv_s1 = Conv2d(dim, dim // 4, 1, rngs=rngs)
        self.upscale_conv1 = Upscale(dim, dim // 4, rngs=rngs)
        self.upscale_norm = LayerNorm(dim // 4, eps=1e-6)
        self.upscale_conv2 = Upscale(dim // 4, dim // 8, rngs=rngs)
        self.output_hypernetworks_mlps = stack_layers(
            lambda r: MLP((dim, dim, dim, dim // 8), jax.nn.relu, rngs=r), NUM_MASK_TOKENS, rngs
        )
        self.iou_prediction_head = MLP((dim, dim, dim, NUM_MASK_TOKENS), jax.nn.relu, rngs=rngs)
        self.pred_obj_score_head = MLP((dim, dim, dim, 1), jax.nn.relu, rngs=rngs)

    def __call__(
        self,
        image: Float[Array, "images g g d_model"],
        s1: Float[Array, "images 2*g 2*g d_model/4"],
        s0: Float[Array, "images 4*g 4*g d_model/8"],
        image_position: Float[Array, "cells d_model"],
        sparse_prompt: Float[Array, "images objects prompts d_model"],
        dense_prompt: Float[Array, "d_model"],
    ) -> MaskDecoding:
        """Decode all objects of all images; compute follows the dtype of `image`.

        Of the last three mask tokens' candidates the one with the highest predicted IoU is chosen, the first
        on ties; no gradient flows through the choice. The first mask token's own mask is never used. The
        object score hides nothing: that is the caller's decision.
        """
        dtype = image.dtype
        own = jnp.concatenate([self.obj_score_token[...], self.iou_token[...], self.mask_tokens[...]])
        own = jnp.broadcast_to(own, (*sparse_prompt.shape[:2], *own.shape))
        tokens = jnp.concatenate([own.astype(dtype), sparse_prompt.astype(dtype)], axis=2)

        grid = image.shape[1]
        cells = rearrange(image + dense_prompt.astype(dtype), "b r c d -> b 1 (r c) d")
        tokens, cells = (constrain(x, "sam2.images", None, None, None) for x in (tokens, cells))
        tokens, cells = self.transformer(tokens, cells, image_position.astype(dtype))
        tokens, cells = (constrain(x, "sam2.images", None, None, None) for x in (tokens, cells))
        object_token, iou_token = tokens[:, :, 0], tokens[:, :, 1]
        mask_tokens = tokens[:, :, 2 : 2 + NUM_MASK_TOKENS]

        x = rearrange(cells, "b o (r c) d -> b o r c d", r=grid)
        x = gelu(self.upscale_norm(self.upscale_conv1(x) + s1[:, None].astype(dtype)))
        x = gelu(self.upscale_conv2(x) + s0[:, None].astype(dtype))
        weights = self.mask_weights(mask_tokens)[:, :, 1:]
        multimasks = einsum("bomd,borcd->bomrc", weights, x)

        # The heads are tiny and decide: float32 under any policy.
        ious = jax.nn.sigmoid(self.iou_prediction_head(iou_token.astype(jnp.float32)))[..., 1:]
        object_scores = self.pred_obj_score_head(object_token.astype(jnp.float32))[..., 0]
        best = jnp.argmax(ious, axis=-1)[..., None]

        def chosen(
            candidates: Float[Array, "images objects 3 *rest"],
        ) -> Float[Array, "images objects *rest"]:
            index = best.reshape(best.shape + (1,) * (candidates.ndim - best.ndim))
            return jnp.take_along_axis(candidates, index, axis=2)[:, :, 0]

        return MaskDecoding(
            masks=chosen(multimasks),
            multimasks=multimasks,
            ious=ious,
            object_scores=object_scores,
            mask_tokens=chosen(mask_tokens[:, :, 1:]).astype(jnp.float32),
        )

    def mask_weights(
        self, mask_tokens: Float[Array, "images objects masks d_model"]
    ) -> Float[Array, "images objects masks d_model/8"]:
        """Each mask token through its own network."""
        graphdef, state = nnx.split(self.output_hypernetworks_mlps)
        state = gathered("sam2.sam_mask_decoder.output_hypernetworks_mlps", state)

        def one(state, token):
            return nnx.merge(graphdef, state)(token)

        return jax.vmap(one, in_axes=(0, 2), out_axes=2)(state, mask_tokens)
