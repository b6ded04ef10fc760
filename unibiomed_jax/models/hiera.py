"""Hiera (Ryali et al. 2023, arXiv 2306.00989) and the feature pyramid: SAM2's image encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Bool, Float

from unibiomed_jax.config.model import HieraConfig, HieraRun
from unibiomed_jax.models.attention import attention
from unibiomed_jax.models.layers import (
    LINEAR_INIT,
    Conv2d,
    LayerNorm,
    Linear,
    scan_layers,
    stack_layers,
    unstack_layers,
)
from unibiomed_jax.models.ops import gelu, resize_bicubic
from unibiomed_jax.sharding.constraints import constrain
from unibiomed_jax.sharding.target import target

PATCH_STRIDE = 4

# Cells whose activations stay in the cache of a CPU core at any width of the trunk.
CELLS_IN_CACHE = 2048


def max_pool(
    x: Float[Array, "batch 2*rows 2*columns channels"],
) -> Float[Array, "batch rows columns channels"]:
    """torch.nn.MaxPool2d(2) of even-sized maps."""
    return reduce(x, "b (r i) (c j) d -> b r c d", "max", i=2, j=2)


def to_windows(
    x: Float[Array, "batch rows columns channels"], window: int
) -> Float[Array, "windows window window channels"]:
    """Cut maps into square windows, padding the bottom and the right with zeros."""
    pad = [(0, -size % window) for size in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *pad, (0, 0)))
    return rearrange(x, "b (r i) (c j) d -> (b r c) i j d", i=window, j=window)


def from_windows(
    x: Float[Array, "windows window window channels"], grid: int
) -> Float[Array, "batch grid grid channels"]:
    """Undo `to_windows` for maps of grid x grid cells."""
    across = -(-grid // x.shape[1])
    x = rearrange(x, "(b r c) i j d -> b (r i) (c j) d", r=across, c=across)
    return x[:, :grid, :grid]


class HieraAttention(nnx.Module):
    """Attention inside a window; with `pools` the queries are max-pooled 2x2, and so is the output grid."""

    def __init__(self, run: HieraRun, *, rngs: nnx.Rngs):
        self.qkv = Linear(run.dim_in, 3 * run.dim_out, rngs=rngs)
        self.proj = Linear(run.dim_out, run.dim_out, rngs=rngs)
        self.num_heads, self.pools = run.num_heads, run.pools

    def __call__(self, x: Float[Array, "windows i j dim_in"]) -> Float[Array, "windows i2 j2 dim_out"]:
        qkv = self.qkv(x)
        if self.qkv.kernel[...].dtype == jnp.bfloat16:
            qkv = qkv.astype(jnp.bfloat16)  # a layer whose products are bfloat16 attends in it, too
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if self.pools:
            q = max_pool(q)
        shape = q.shape
        q, k, v = (rearrange(y, "b i j (h d) -> b (i j) h d", h=self.num_heads) for y in (q, k, v))
        axes = ("sam2.windows", None, None)
        return self.proj(attention(q, k, v, tower="sam2 encoder", axes=axes).reshape(shape))


class HieraMlp(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(dim, 4 * dim, rngs=rngs)
        self.fc2 = Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self.fc2(gelu(self.fc1(x)))


class HieraBlock(nnx.Module):
    """Pre-norm transformer block on windows.

    Where the width changes, the residual is a projection of the *normalised* input, pooled like the queries.
    """

    def __init__(self, run: HieraRun, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(run.dim_in, eps=1e-6)
        self.attn = HieraAttention(run, rngs=rngs)
        self.norm2 = LayerNorm(run.dim_out, eps=1e-6)
        self.mlp = HieraMlp(run.dim_out, rngs=rngs)
        if run.dim_in != run.dim_out:
            self.proj = Linear(run.dim_in, run.dim_out, rngs=rngs)

    def __call__(
        self, x: Float[Array, "windows i j dim_in"], valid: Bool[Array, "windows i j 1"] | None
    ) -> Float[Array, "windows i2 j2 dim_out"]:
        y = self.norm1(x)
        residual = x
        if hasattr(self, "proj"):
            residual = max_pool(self.proj(y))
        if valid is not None:
            y = jnp.where(valid, y, 0)
        x = residual + self.attn(y).astype(x.dtype)
        return x + self.mlp(self.norm2(x))


class Hiera(nnx.Module):
    """The trunk: four stages of windowed attention, each at half the resolution and twice the width."""

    def __init__(self, config: HieraConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, window = config.embed_dim, config.window_spec[0]
        self.patch_embed = Conv2d(3, dim, 7, stride=PATCH_STRIDE, padding=3, rngs=rngs)
        self.pos_embed = nnx.Param(LINEAR_INIT(rngs.params(), (*config.position_grid, dim)))
        self.pos_embed_window = nnx.Param(LINEAR_INIT(rngs.params(), (window, window, dim)))
        self.runs = nnx.List(
            [
                stack_layers(lambda r, run=run: HieraBlock(run, rngs=r), run.count, rngs)
                for run in config.runs()
            ]
        )

    def position(self, grid: int) -> Float[Array, "grid grid dim"]:
        """A coarse table resized to the grid plus a table that repeats in every window (arXiv 2311.05613)."""
        window = self.pos_embed_window[...]
        times = grid // window.shape[0]
        return resize_bicubic(self.pos_embed[...], (grid, grid)) + jnp.tile(window, (times, times, 1))

    def __call__(
        self, pixels: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> list[Float[Array, "batch grid grid dim"]]:
        """The last map of every stage, finest first: strides 4, 8, 16, 32. `size` must divide by 32."""
        x = self.patch_embed(constrain(pixels, "sam2.images", None, None, None))
        x = x + self.position(x.shape[1]).astype(x.dtype)
        maps = []
        for index, (run, blocks) in enumerate(zip(self.config.runs(), self.runs, strict=True)):
            x = run_blocks(blocks, run, x, remat, f"sam2.image_encoder.trunk.runs.{index}")
            if run.first + run.count - 1 in self.config.stage_ends:
                maps.append(x)
        return maps


def run_blocks(
    blocks: HieraBlock, run: HieraRun, x: Float[Array, "batch grid grid dim_in"], remat: str, path: str
) -> Float[Array, "batch grid2 grid2 dim_out"]:
    """Run equal blocks, which lie at `path` in the model, by one scan.

    The map is cut into windows once for all of them: apart from the attention everything is local to a cell.
    Where the grid is no multiple of the window, attention sees zeros in the padding, as in torch.
    """
    grid = x.shape[1]
    window = run.window or grid
    valid = None
    if grid % window:
        valid = to_windows(jnp.ones((x.shape[0], grid, grid, 1), bool), window)
    if run.pools:
        blocks = unstack_layers(
            blocks
        )  # a scan cannot carry a map that shrinks; such a run is one block long

    def run_all(windows, valid):
        def step(block, x, _):
            return block(constrain(x, "sam2.windows", None, None, None), valid), None

        return scan_layers(blocks, step, windows, path=path, remat=remat)[0]

    windows = to_windows(x, window)
    count = bands(len(windows), window)
    if count == 1:
        windows = run_all(windows, valid)
    else:
        split = jax.tree.map(lambda y: y.reshape(count, -1, *y.shape[1:]), (windows, valid))
        windows = jax.lax.map(lambda band: run_all(*band), split)
        windows = windows.reshape(-1, *windows.shape[2:])
    x = from_windows(windows, grid // 2 if run.pools else grid)
    return constrain(x, "sam2.images", None, None, None)


def bands(windows: int, window: int) -> int:
    """In how many bands to run the windows, one after the other: on a CPU a band should stay in its cache.

    Elsewhere, and where several devices share the windows, there is one: each device would have to fetch the
    others' windows.
    """
    count = windows * window**2 // CELLS_IN_CACHE if target() == ("cpu", 1) else 1
    while count > 1 and windows % count:
        count -= 1
    return max(count, 1)


class ImageEncoder(nnx.Module):
    """The trunk and a feature pyramid (Lin et al. 2017) whose two finest levels stay without top-down sum."""

    def __init__(self, config: HieraConfig, d_model: int, *, rngs: nnx.Rngs):
        self.trunk = Hiera(config, rngs=rngs)
        self.neck = nnx.List([Conv2d(dim, d_model, 1, rngs=rngs) for dim in reversed(config.stage_dims)])

    def __call__(
        self, pixels: Float[Array, "batch size size 3"], *, remat: str = "none"
    ) -> tuple[
        Float[Array, "batch 4*grid 4*grid d_model"],
        Float[Array, "batch 2*grid 2*grid d_model"],
        Float[Array, "batch grid grid d_model"],
    ]:
        """Levels at strides 4, 8 and 16; the last one is summed with the coarsest in float32."""
        x0, x1, x2, x3 = self.trunk(pixels, remat=remat)
        coarse = repeat(self.neck[0](x3).astype(jnp.float32), "b r c d -> b (r i) (c j) d", i=2, j=2)
        level2 = self.neck[1](x2).astype(jnp.float32) + coarse
        return self.neck[3](x0), self.neck[2](x1), level2.astype(pixels.dtype)
