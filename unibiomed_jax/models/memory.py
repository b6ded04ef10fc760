"""SAM2's memory: the encoder that stores a segmented frame, and the attention that reads stored frames.

A memory has a fixed shape: slots for whole frames, tokens for object pointers, and a validity for each. All
objects of a volume are processed together on a leading axis; they share which slots are valid.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from unibiomed_jax.config.model import Sam2Config
from unibiomed_jax.models.attention import MASKED, attention, choose, running_softmax
from unibiomed_jax.models.layers import LINEAR_INIT, Conv2d, LayerNorm, Linear, scan_layers, stack_layers
from unibiomed_jax.models.ops import apply_axial_rope, gelu, sine_position


class Memory(NamedTuple):
    """What the memory attention may read; N = cells of the feature map."""

    # Features of stored frames. Their position, which enters the keys only, is added when they are read.
    frames: Float[Array, "slots objects N memory_dim"]
    # Temporal embedding of each slot.
    time: Float[Array, "slots memory_dim"]
    frames_valid: Bool[Array, "slots"]
    # Object pointers, cut into tokens of memory_dim; they have no position.
    pointers: Float[Array, "objects tokens memory_dim"]
    pointers_valid: Bool[Array, "tokens"]


class MaskDownsampler(nnx.Module):
    """A mask at image resolution brought to the feature map's: four convolutions of stride 2."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        channels = (1, 4, 16, 64, 256)
        self.convs = nnx.List(
            [
                Conv2d(i, o, 3, stride=2, padding=1, rngs=rngs)
                for i, o in zip(channels[:-1], channels[1:], strict=True)
            ]
        )
        self.norms = nnx.List([LayerNorm(o, eps=1e-6) for o in channels[1:]])
        self.conv_out = Conv2d(channels[-1], d_model, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "batch 16*g 16*g 1"]) -> Float[Array, "batch g g d_model"]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = gelu(norm(conv(x)))
        return self.conv_out(x)


class DepthwiseConv(nnx.Module):
    """torch.nn.Conv2d of 7x7 with a group per channel and padding 3, as a sum of shifted maps.

    On a CPU that is twenty times faster than XLA's grouped convolution.
    """

    SIZE = 7

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(LINEAR_INIT(rngs.params(), (self.SIZE, self.SIZE, 1, dim)))
        self.bias = nnx.Param(jnp.zeros((dim,)))

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns dim"]:
        rows, columns = x.shape[1:3]
        margin = self.SIZE // 2
        padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0))).astype(jnp.float32)
        kernel = self.kernel[...][:, :, 0].astype(jnp.float32)
        y = self.bias[...].astype(jnp.float32)
        for i, j in np.ndindex(self.SIZE, self.SIZE):
            y = y + padded[:, i : i + rows, j : j + columns] * kernel[i, j]
        return y.astype(x.dtype)


class FuserBlock(nnx.Module):
    """ConvNeXt block (Liu et al. 2022, arXiv 2201.03545)."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.dwconv = DepthwiseConv(dim, rngs=rngs)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = Linear(dim, 4 * dim, rngs=rngs)
        self.pwconv2 = Linear(4 * dim, dim, rngs=rngs)
        self.g_weight = nnx.Param(jnp.full((dim,), 1e-6))

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns dim"]:
        y = self.pwconv2(gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.g_weight[...].astype(x.dtype) * y


class Fuser(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.layers = stack_layers(lambda r: FuserBlock(dim, rngs=r), 2, rngs)

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns dim"]:
        path = "sam2.memory_encoder.fuser.layers"
        return scan_layers(self.layers, lambda block, x, _: (block(x), None), x, path=path)[0]


class MemoryEncoder(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        self.mask_downsampler = MaskDownsampler(config.d_model, rngs=rngs)
        self.pix_feat_proj = Conv2d(config.d_model, config.d_model, 1, rngs=rngs)
        self.fuser = Fuser(config.d_model, rngs=rngs)
        self.out_proj = Conv2d(config.d_model, config.memory_dim, 1, rngs=rngs)

    def __call__(
        self, image: Float[Array, "images g g d_model"], masks: Float[Array, "images objects 16*g 16*g"]
    ) -> Float[Array, "images objects g g memory_dim"]:
        """Store what was segmented where.

        `masks` are logits at SAM2's image size, turned in float32 into 20 * sigmoid - 10. The feature map
        comes without `no_mem_embed`; its projection is shared by the objects.
        """
        objects = masks.shape[1]
        prompt = (20 * jax.nn.sigmoid(masks.astype(jnp.float32)) - 10).astype(image.dtype)
        prompt = self.mask_downsampler(rearrange(prompt, "b o r c -> (b o) r c 1"))
        x = self.pix_feat_proj(image)[:, None] + rearrange(prompt, "(b o) r c d -> b o r c d", o=objects)
        x = self.out_proj(self.fuser(rearrange(x, "b o r c d -> (b o) r c d")))
        return rearrange(x, "(b o) r c d -> b o r c d", o=objects)


class RopeAttention(nnx.Module):
    """Single-head attention whose queries and keys carry a two-dimensional rotary position."""

    def __init__(self, dim: int, key_dim: int, *, rngs: nnx.Rngs):
        self.q_proj = Linear(dim, dim, rngs=rngs)
        self.k_proj = Linear(key_dim, dim, rngs=rngs)
        self.v_proj = Linear(key_dim, dim, rngs=rngs)
        self.out_proj = Linear(dim, dim, rngs=rngs)

    def attend_self(self, x: Float[Array, "objects N dim"], grid: int) -> Float[Array, "objects N dim"]:
        q, k = (apply_axial_rope(proj(x), grid) for proj in (self.q_proj, self.k_proj))
        out = attention(q[:, :, None], k[:, :, None], self.v_proj(x)[:, :, None], tower="memory")
        return self.out_proj(out[:, :, 0])

    def attend_memory(
        self, x: Float[Array, "objects N dim"], memory: Memory, grid: int
    ) -> Float[Array, "objects N dim"]:
        """Read the memory: by a kernel all of it at once, else object by object.

        There is one head and values are linear in the memory, so the weights are applied to the raw memory
        (memory_dim channels) and projected once afterwards; as weights sum to one, the bias passes through.
        """
        q = apply_axial_rope(self.q_proj(x), grid)
        slots, _, cells, channels = memory.frames.shape
        keys = slots * cells + memory.pointers.shape[1]
        chosen = choose("memory", q.dtype, q.shape[1], keys, q.shape[-1], channels, masked=True)
        read = self._read_in_turn if chosen == "xla" else self._read_at_once
        return self.out_proj(self.v_proj(read(q, memory, grid)))

    def _frame_keys(
        self,
        frames: Float[Array, "*objects N memory_dim"],
        time: Float[Array, "memory_dim"],
        grid: int,
        dtype,
    ) -> Float[Array, "*objects N dim"]:
        """Keys of a slot."""
        place = sine_position((grid, grid), time.shape[-1]).reshape(grid * grid, -1)
        position = (place + time.astype(jnp.float32)).astype(frames.dtype)
        return apply_axial_rope(self.k_proj((frames + position).astype(dtype)), grid)

    def _read_at_once(
        self, q: Float[Array, "objects N dim"], memory: Memory, grid: int
    ) -> Float[Array, "objects N memory_dim"]:
        """The memory's mean under the weights; keys that are not valid are left out."""
        keys = jax.vmap(lambda frames, time: self._frame_keys(frames, time, grid, q.dtype))(
            memory.frames, memory.time
        )
        pointers = memory.pointers.astype(q.dtype)

        def all_tokens(frames, pointers):
            return jnp.concatenate([rearrange(frames, "s o n d -> o (s n) d"), pointers], axis=1)[:, :, None]

        valid = jnp.concatenate([jnp.repeat(memory.frames_valid, q.shape[1]), memory.pointers_valid])
        return attention(
            q[:, :, None],
            all_tokens(keys, self.k_proj(pointers)),
            all_tokens(memory.frames.astype(q.dtype), pointers),
            tower="memory",
            key_valid=jnp.broadcast_to(valid, (len(q), len(valid))),
        )[:, :, 0]

    def _read_in_turn(
        self, q: Float[Array, "objects N dim"], memory: Memory, grid: int
    ) -> Float[Array, "objects N memory_dim"]:
        """The same slot by slot, with a running softmax; empty slots cost nothing."""

        def read_object(inputs):
            q, frames, pointers = inputs

            def read_slot(state, slot):
                frame, time, valid = slot

                def read_valid(state):
                    keys = self._frame_keys(frame, time, grid, q.dtype)
                    return running_softmax(state, q, keys, frame.astype(q.dtype))

                return jax.lax.cond(valid, read_valid, lambda state: state, state), None

            empty = (
                jnp.full((len(q), 1), MASKED),
                jnp.zeros((len(q), 1)),
                jnp.zeros((len(q), pointers.shape[-1])),
            )
            state = running_softmax(empty, q, self.k_proj(pointers), pointers, memory.pointers_valid)
            state, _ = jax.lax.scan(read_slot, state, (frames, memory.time, memory.frames_valid))
            _, total, mixed = state
            return (mixed / total).astype(q.dtype)

        frames, pointers = jnp.moveaxis(memory.frames, 1, 0), memory.pointers.astype(q.dtype)
        return jax.lax.map(read_object, (q, frames, pointers))


class MemoryAttentionLayer(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        dim = config.d_model
        self.self_attn = RopeAttention(dim, dim, rngs=rngs)
        self.cross_attn_image = RopeAttention(dim, config.memory_dim, rngs=rngs)
        self.linear1 = Linear(dim, config.memory_mlp_dim, rngs=rngs)
        self.linear2 = Linear(config.memory_mlp_dim, dim, rngs=rngs)
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.norm3 = LayerNorm(dim, eps=1e-5)

    def __call__(
        self, x: Float[Array, "objects N dim"], memory: Memory, grid: int
    ) -> Float[Array, "objects N dim"]:
        x = x + self.self_attn.attend_self(self.norm1(x), grid)
        x = x + self.cross_attn_image.attend_memory(self.norm2(x), memory, grid)
        return x + self.linear2(jax.nn.relu(self.linear1(self.norm3(x))))


class MemoryAttention(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs):
        self.layers = stack_layers(lambda r: MemoryAttentionLayer(config, rngs=r), config.memory_layers, rngs)
        self.norm = LayerNorm(config.d_model, eps=1e-5)

    def __call__(
        self, image: Float[Array, "g g d_model"], memory: Memory
    ) -> Float[Array, "objects g g d_model"]:
        """The frame's feature map as each object's memory conditions it.

        `image` comes without `no_mem_embed`. At least one slot or pointer must be valid.
        """
        grid, _, dim = image.shape
        x = image + (0.1 * sine_position((grid, grid), dim)).astype(image.dtype)
        x = jnp.broadcast_to(x.reshape(1, grid * grid, dim), (memory.pointers.shape[0], grid * grid, dim))
        path = "sam2.memory_attention.layers"
        x, _ = scan_layers(self.layers, lambda layer, x, _: (layer(x, memory, grid), None), x, path=path)
        return self.norm(x).reshape(-1, grid, grid, dim)
