"""InternViT: the vision transformer whose patch features the language model reads (arXiv 2312.14238)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unibiomed_jax.config.model import VisionConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.attention import attention
from unibiomed_jax.models.layers import LINEAR_INIT, LayerNorm, Linear, matmul, scan_layers, stack_layers
from unibiomed_jax.models.ops import gelu
from unibiomed_jax.sharding.constraints import constrain


class PatchEmbed(nnx.Module):
    """Non-overlapping patches to vectors: torch.nn.Conv2d with stride = kernel size, as one matmul."""

    def __init__(self, patch_size: int, features: int, *, rngs: nnx.Rngs):
        shape = (patch_size, patch_size, 3, features)
        self.kernel = nnx.Param(LINEAR_INIT(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, pixels: Float[Array, "tiles side side 3"]) -> Float[Array, "tiles patches features"]:
        """Patches come in row-major order."""
        p, _, channels, features = self.kernel[...].shape
        tiles, side = pixels.shape[:2]
        grid = side // p
        patches = pixels.reshape(tiles, grid, p, grid, p, channels).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(tiles, grid * grid, p * p * channels)
        kernel = self.kernel[...].reshape(-1, features).astype(pixels.dtype)
        return (matmul(patches, kernel) + self.bias[...].astype(jnp.float32)).astype(pixels.dtype)


class VisionAttention(nnx.Module):
    """Full self-attention with one fused projection whose output axis is (q k v, heads, head_dim)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width, use_bias=config.qkv_bias, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "tiles tokens width"]) -> Float[Array, "tiles tokens width"]:
        tiles, tokens, width = x.shape
        qkv = self.qkv(x).reshape(tiles, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        out = attention(q, k, v, tower="vision", axes=("vision.tiles", None, None))
        return self.proj(out.reshape(tiles, tokens, width))


class VisionMLP(nnx.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.mlp_dim, rngs=rngs)
        self.fc2 = Linear(config.mlp_dim, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "tiles tokens width"]) -> Float[Array, "tiles tokens width"]:
        return self.fc2(gelu(self.fc1(x)))


def drop_path(
    x: Float[Array, "tiles tokens width"], rate: Float[Array, ""], key: Array | None
) -> Float[Array, "tiles tokens width"]:
    """Drop a whole branch per tile with probability `rate` and scale the kept ones by 1 / (1 - rate).

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382), as timm's DropPath; without a key, the identity.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


class VisionBlock(nnx.Module):
    """Pre-norm transformer block; a learned vector scales each branch before it is added."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.norm1 = LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config, rngs=rngs)
        self.ls1 = nnx.Param(jnp.full((width,), 0.1, jnp.float32))
        self.norm2 = LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config, rngs=rngs)
        self.ls2 = nnx.Param(jnp.full((width,), 0.1, jnp.float32))

    def __call__(
        self, x: Float[Array, "tiles tokens width"], rate: Float[Array, ""], keys: Array | None
    ) -> Float[Array, "tiles tokens width"]:
        """`keys` are the two random keys of stochastic depth at drop rate `rate`, or None."""
        key1, key2 = (None, None) if keys is None else keys
        x = x + drop_path(self.attn(self.norm1(x)) * self.ls1[...].astype(x.dtype), rate, key1)
        return x + drop_path(self.mlp(self.norm2(x)) * self.ls2[...].astype(x.dtype), rate, key2)


class InternVisionModel(nnx.Module):
    """InternViT without a final norm: the output is the raw residual stream of the last block."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.patch_embedding = PatchEmbed(config.patch_size, width, rngs=rngs)
        self.class_embedding = nnx.Param(LINEAR_INIT(rngs.params(), (width,), jnp.float32))
        self.position_embedding = nnx.Param(
            LINEAR_INIT(rngs.params(), (1 + config.grid**2, width), jnp.float32)
        )
        self.layers = stack_layers(lambda r: VisionBlock(config, rngs=r), config.num_layers, rngs)
        self.config = config

    def __call__(
        self,
        pixels: Float[Array, "tiles side side 3"],
        *,
        remat: str = "none",
        drop_path_key: Array | None = None,
    ) -> Float[Array, "tiles tokens width"]:
        """Encode normalised RGB tiles; tokens are the class token, then the patches row by row.

        Args:
            remat: what the backward pass recomputes: "none", "full" or "dots" (see `scan_layers`).
            drop_path_key: switches on stochastic depth at the config's rate (training).

        Raises:
            InputError: the tiles are not config.image_size pixels wide and high.
        """
        config = self.config
        if pixels.shape[1:] != (config.image_size, config.image_size, 3):
            rows, columns = pixels.shape[1:3]
            raise InputError(
                f"The vision model reads RGB tiles of {config.image_size}x{config.image_size} pixels, not "
                f"{rows}x{columns}: cut or resize the image to that size."
            )
        x = self.patch_embedding(pixels)
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([class_token, x], axis=1) + self.position_embedding[...].astype(x.dtype)

        rates = np.linspace(0, config.drop_path_rate, config.num_layers, dtype=np.float32)
        keys = None
        if drop_path_key is not None and config.drop_path_rate:
            keys = jax.random.split(drop_path_key, (config.num_layers, 2))

        def step(block, x, rate_and_keys):
            return block(constrain(x, "vision.tiles", None, None), *rate_and_keys), None

        x, _ = scan_layers(self.layers, step, x, (rates, keys), path="vision_model.layers", remat=remat)
        return constrain(x, "vision.tiles", None, None)
