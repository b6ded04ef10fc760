"""UniBiomed on one page.

    image ─ tiles ──► InternViT ─► pixel shuffle ─► mlp1 ─┐
    prompt ─ token ids ─► embedding table, <IMG_CONTEXT> ◄┘ ─► Qwen2.5 ─► text
                                                                  └─ hidden state at every [SEG]
                                                                        └─► text_hidden_fcs ─┐
    image ─ 1024 x 1024 ──► SAM2 image encoder ──► mask decoder, prompted by that vector ◄───┘ ─► mask

Source: UniBiomed (Wu et al. 2025, arXiv 2504.21336): InternVL2.5-1B and SAM2 Hiera-L, joined as in Sa2VA.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from unibiomed_jax.config.model import NO_REMAT, ModelConfig, RematConfig
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.models.internvit import InternVisionModel
from unibiomed_jax.models.layers import Linear
from unibiomed_jax.models.mask_decoder import MaskDecoding
from unibiomed_jax.models.ops import normalize, normalize_fused
from unibiomed_jax.models.projector import Projector, pixel_shuffle
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.models.sam2 import (
    FrameMasks,
    FramePlan,
    ImageFeatures,
    Sam2,
    TrackState,
    plan_frames,
)
from unibiomed_jax.sharding.constraints import constrain


class Forward(NamedTuple):
    """What the whole model computes of complete conversations; M is the side of SAM2's masks."""

    # The language model's state at every token, after its last norm.
    hidden: Float[Array, "batch tokens embed"]
    # Mask logits of every object in every frame.
    masks: Float[Array, "batch objects frames M M"]


class TextHiddenFcs(nnx.Module):
    """The bridge from the language model's hidden state at [SEG] to SAM2's prompt space."""

    def __init__(self, hidden_size: int, d_model: int, *, rngs: nnx.Rngs):
        self.linear1 = Linear(hidden_size, hidden_size, rngs=rngs)
        self.linear2 = Linear(hidden_size, d_model, rngs=rngs)

    def __call__(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... d_model"]:
        return self.linear2(jax.nn.relu(self.linear1(hidden)))


class UniBiomedModel(nnx.Module):
    """All five parts; attribute names follow the released checkpoint. Images come in as RGB bytes."""

    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs):
        self.config, self.precision = config, precision
        self.vision_model = InternVisionModel(config.vision, rngs=rngs)
        folded = config.vision.hidden_size * round(1 / config.downsample_ratio) ** 2
        self.mlp1 = Projector(folded, config.language.hidden_size, rngs=rngs)
        self.language_model = Qwen2(config.language, rngs=rngs)
        self.text_hidden_fcs = TextHiddenFcs(config.language.hidden_size, config.sam2.d_model, rngs=rngs)
        self.sam2 = Sam2(config.sam2, precision, rngs=rngs)

    def __call__(
        self,
        tiles: UInt8[Array, "batch tiles side side 3"],
        ids: Int[Array, "batch tokens"],
        source: Int[Array, "batch tokens"],
        frames: UInt8[Array, "batch frames size size 3"],
        places: Int[Array, "batch objects"],
        *,
        follow: bool = False,
        remat: RematConfig = NO_REMAT,
        dropout_key: Array | None = None,
    ) -> Forward:
        """Complete conversations to states and masks, as training needs them.

        Args:
            tiles: what the language model sees of each image, or of each frame.
            ids: question and answer.
            source: for every token the visual row that takes its place, or -1 (see `visual_source`).
            frames: what SAM2 sees: one image, or the frames of a sequence; none for words alone.
            places: the token, a [SEG], that each object is read from.
            follow: segment the frames after SAM2's prompted ones by following the objects, as inference does.
            remat: what the backward pass computes again.
            dropout_key: switches on the dropout of adapters and the stochastic depth of the vision model.
        """
        tiles, frames = normalize_fused(tiles), normalize_fused(frames)
        lora_key = path_key = None
        if dropout_key is not None:
            lora_key, path_key = jax.random.split(dropout_key)
        visual = self.visual_rows(tiles, remat=remat.vision, drop_path_key=path_key)
        embeds = self.embed_prompt(ids, visual, source)
        hidden = self.language_model(embeds, remat=remat.language, lora_dropout_key=lora_key)
        states = constrain(jnp.take_along_axis(hidden, places[..., None], axis=1), "batch", None, None)

        batch, count = frames.shape[:2]
        objects, side = places.shape[1], 4 * self.config.sam2.grid
        if objects * count == 0:
            masks = jnp.zeros((batch, count, objects, side, side), jnp.float32)
        elif follow and count > self.config.sam2.max_conditioning_frames:
            plan = plan_frames(count, self.config.sam2)
            masks = jax.vmap(lambda *inputs: self.segment_frames(*inputs, plan).masks)(frames, states)
        else:
            features = self.encode_image(frames.reshape(-1, *frames.shape[2:]), remat=remat.sam2_encoder)
            masks = self.segment(features, jnp.repeat(states, count, axis=0)).masks
        masks = masks.reshape(batch, count, objects, side, side).swapaxes(1, 2)
        return Forward(hidden, constrain(masks, "batch", None, None, None, None))

    # ---------------------------------------------------------------------------------- images to the words

    def encode_tiles(
        self,
        pixels: UInt8[Array, "tiles side side 3"],
        *,
        remat: str = "none",
        drop_path_key: Array | None = None,
    ) -> Float[Array, "tiles tokens embed"]:
        """Tiles to rows of the language model's input; the class token is dropped.

        `remat` and `drop_path_key` are for training, see `InternVisionModel`.
        """
        config = self.config
        pixels = normalize(pixels).astype(self.precision.vision)
        hidden = self.vision_model(pixels, remat=remat, drop_path_key=drop_path_key)
        grid = hidden[:, 1:].reshape(-1, config.vision.grid, config.vision.grid, config.vision.hidden_size)
        return self.mlp1(pixel_shuffle(grid, config.downsample_ratio, config.ps_version))

    def visual_rows(
        self, tiles: UInt8[Array, "batch tiles side side 3"], **options
    ) -> Float[Array, "batch rows embed"]:
        """The rows of all tiles of an image, one after the other; see `encode_tiles` for the options."""
        rows = self.encode_tiles(tiles.reshape(-1, *tiles.shape[2:]), **options)
        return constrain(rows.reshape(len(tiles), -1, rows.shape[-1]), "batch", None, None)

    def embed_prompt(
        self,
        ids: Int[Array, "batch length"],
        visual: Float[Array, "batch rows embed"],
        source: Int[Array, "batch length"],
    ) -> Float[Array, "batch length embed"]:
        """Embed token ids; where `source` is not -1 the visual row of that number takes the token's place."""
        text = self.language_model.embed(ids).astype(self.precision.language)
        rows = jnp.take_along_axis(visual, jnp.maximum(source, 0)[..., None], axis=1).astype(text.dtype)
        embeds = jnp.where(source[..., None] >= 0, rows, text)
        return constrain(embeds, "batch", "language.tokens", None)

    # ----------------------------------------------------------------------------------- words to the masks

    def encode_image(
        self, pixels: UInt8[Array, "images size size 3"], *, remat: str = "none"
    ) -> ImageFeatures:
        """SAM2's features of whole images; they serve every [SEG] said about the image."""
        return self.sam2.encode_image(pixels, remat=remat)

    def prompt_vectors(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... d_model"]:
        """Language-model states at [SEG] to SAM2 prompts; two small layers, float32 under any policy."""
        return self.text_hidden_fcs(hidden.astype(jnp.float32))

    def segment(self, features: ImageFeatures, hidden: Float[Array, "images objects embed"]) -> MaskDecoding:
        """One mask for every [SEG] state of every image, all decoded in one call."""
        hidden = constrain(hidden, "sam2.images", None, None)
        prompts = constrain(self.prompt_vectors(hidden), "sam2.images", None, None)
        return self.sam2.decode(features, prompts)

    def segment_frames(
        self,
        frames: UInt8[Array, "frames size size 3"],
        hidden: Float[Array, "objects embed"],
        plan: FramePlan,
    ) -> FrameMasks:
        """Segment the frames of a volume: some from the [SEG] states, the others by following the objects."""
        return self.sam2.segment_frames(frames, self.prompt_vectors(hidden), plan)

    def segment_step(
        self,
        state: TrackState,
        frame: UInt8[Array, "1 size size 3"],
        hidden: Float[Array, "objects embed"],
        plan: FramePlan,
        *place: Int[Array, ""],
    ) -> tuple[TrackState, FrameMasks]:
        """One frame of a volume, where they are not all at hand; `place`: step, frame and direction."""
        return self.sam2.segment_step(state, frame, self.prompt_vectors(hidden), plan, *place)

    def empty_track(self, objects: int) -> TrackState:
        """What is remembered of a volume before its first frame."""
        return self.sam2.empty_state(objects)


def visual_source(ids: Int[Array, "batch tokens"], image_id: int) -> Int[Array, "batch tokens"]:
    """The visual row that takes the place of every token: row k that of the k-th image token; -1: none."""
    is_image = ids == image_id
    return jnp.where(is_image, jnp.cumsum(is_image, axis=1) - 1, -1)
