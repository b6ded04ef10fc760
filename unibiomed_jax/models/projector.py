"""From patch features to language-model tokens: space-to-depth, then a small MLP."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from unibiomed_jax.errors import InputError
from unibiomed_jax.models.layers import LayerNorm, Linear
from unibiomed_jax.models.ops import gelu


def pixel_shuffle(
    x: Float[Array, "tiles rows columns channels"], ratio: float = 0.5, version: str = "v2"
) -> Float[Array, "tiles rows*ratio columns*ratio channels/ratio**2"]:
    """Fold s x s patches, s = 1 / ratio, into channels: out[i, j, (a, b, c)] = x[s * i + a, s * j + b, c].

    Version "v2" is this ordinary space-to-depth; "v1", of the first InternVL releases, returns it with rows
    and columns swapped.

    Raises:
        InputError: an unknown version, or sides that are not a multiple of 1 / ratio.
    """
    tiles, rows, columns, channels = x.shape
    side = round(1 / ratio)
    if version not in ("v1", "v2"):
        raise InputError(f'Unknown pixel-shuffle version {version!r}: set ps_version to "v1" or "v2".')
    if rows % side or columns % side:
        raise InputError(
            f"A {rows}x{columns} patch grid cannot be folded by {side}: choose a downsample_ratio whose "
            "inverse divides image_size / patch_size."
        )
    x = x.reshape(tiles, rows // side, side, columns // side, side, channels)
    x = x.transpose((0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5))
    return x.reshape(*x.shape[:3], side * side * channels)


class Projector(nnx.Module):
    """LayerNorm, linear, exact GELU, linear (`mlp1` of the checkpoints)."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(in_features, eps=1e-5)
        self.linear1 = Linear(in_features, out_features, rngs=rngs)
        self.linear2 = Linear(out_features, out_features, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.linear2(gelu(self.linear1(self.norm(x))))
