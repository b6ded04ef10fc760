"""UniBiomed on one page.

    image ─ tiles ──► InternViT ─► pixel shuffle ─► mlp1 ─┐
    prompt ─ token ids ─► embedding table, <IMG_CONTEXT> ◄┘ ─► Qwen2.5 ─► text
                                                                  └─ hidden state at every [SEG]
                                                                        └─► text_hidden_fcs ─┐
    image ─ 1024 x 1024 ──► SAM2 image encoder ──► mask decoder, prompted by that vector ◄───┘ ─► mask

Source: UniBiomed (Wu et al. 2025, arXiv 2504.21336): InternVL2.5-1B and SAM2 Hiera-L, joined as in Sa2VA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from unibiomed_jax.config import ModelConfig
from unibiomed_jax.models.internvit import InternVisionModel
from unibiomed_jax.models.layers import Linear
from unibiomed_jax.models.mask_decoder import MaskDecoding
from unibiomed_jax.models.projector import Projector, pixel_shuffle
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.models.sam2 import FrameMasks, FramePlan, ImageFeatures, Sam2


class TextHiddenFcs(nnx.Module):
    """The bridge from the language model's hidden state at [SEG] to SAM2's prompt space."""

    def __init__(self, hidden_size: int, d_model: int, *, rngs: nnx.Rngs):
        self.linear1 = Linear(hidden_size, hidden_size, rngs=rngs)
        self.linear2 = Linear(hidden_size, d_model, rngs=rngs)

    def __call__(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... d_model"]:
        return self.linear2(jax.nn.relu(self.linear1(hidden)))


class UniBiomedModel(nnx.Module):
    """All five parts; attribute names follow the released checkpoint."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = InternVisionModel(config.vision, rngs=rngs)
        folded = config.vision.hidden_size * round(1 / config.downsample_ratio) ** 2
        self.mlp1 = Projector(folded, config.language.hidden_size, rngs=rngs)
        self.language_model = Qwen2(config.language, rngs=rngs)
        self.text_hidden_fcs = TextHiddenFcs(config.language.hidden_size, config.sam2.d_model, rngs=rngs)
        self.sam2 = Sam2(config.sam2, config.precision, rngs=rngs)

    def encode_tiles(
        self,
        pixels: Float[Array, "tiles side side 3"],
        *,
        remat: str = "none",
        drop_path_key: Array | None = None,
    ) -> Float[Array, "tiles tokens embed"]:
        """Normalised tiles to rows of the language model's input; the class token is dropped.

        `remat` and `drop_path_key` are for training, see `InternVisionModel`.
        """
        config = self.config
        pixels = pixels.astype(config.precision.vision)
        hidden = self.vision_model(pixels, remat=remat, drop_path_key=drop_path_key)
        grid = hidden[:, 1:].reshape(-1, config.vision.grid, config.vision.grid, config.vision.hidden_size)
        return self.mlp1(pixel_shuffle(grid, config.downsample_ratio, config.ps_version))

    def embed_prompt(
        self,
        ids: Int[Array, "batch length"],
        visual: Float[Array, "rows embed"],
        source: Int[Array, "batch length"],
    ) -> Float[Array, "batch length embed"]:
        """Embed token ids; where `source` is not -1 the row is `visual[source]` (<IMG_CONTEXT> tokens)."""
        text = self.language_model.embed(ids).astype(self.config.precision.language)
        rows = visual[jnp.maximum(source, 0)].astype(text.dtype)
        return jnp.where(source[..., None] >= 0, rows, text)

    def encode_image(self, pixels: Float[Array, "images side side 3"]) -> ImageFeatures:
        """SAM2's features of whole images; they serve every [SEG] said about the image."""
        return self.sam2.encode_image(pixels)

    def prompt_vectors(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... d_model"]:
        """Language-model states at [SEG] to SAM2 prompts; two small layers, float32 under any policy."""
        return self.text_hidden_fcs(hidden.astype(jnp.float32))

    def segment(self, features: ImageFeatures, hidden: Float[Array, "images objects embed"]) -> MaskDecoding:
        """One mask for every [SEG] state of every image, all decoded in one call."""
        return self.sam2.decode(features, self.prompt_vectors(hidden))

    def segment_frames(
        self,
        frames: UInt8[Array, "frames side side 3"],
        hidden: Float[Array, "objects embed"],
        plan: FramePlan,
    ) -> FrameMasks:
        """Segment the frames of a volume: some from the [SEG] states, the others by following the objects."""
        return self.sam2.segment_frames(frames, self.prompt_vectors(hidden), plan)
