"""SAM2 (Ravi et al. 2024, arXiv 2408.00714) prompted by language: images, volumes and videos.

It differs from the released SAM2 as UniBiomed does: the prompt is a vector of the language model, masks are
never hidden because of their object score, and memories are made of unthresholded masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from unibiomed_jax.config.model import Sam2Config
from unibiomed_jax.config.precision import Precision
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.hiera import ImageEncoder
from unibiomed_jax.models.layers import LINEAR_INIT, MLP, Conv2d
from unibiomed_jax.models.mask_decoder import MaskDecoder, MaskDecoding
from unibiomed_jax.models.memory import Memory, MemoryAttention, MemoryEncoder
from unibiomed_jax.models.ops import normalize, normalize_fused, resize_bilinear
from unibiomed_jax.models.prompt_encoder import PromptEncoder

# A time at which no frame is: its distance to any frame is beyond every window of the memory.
NEVER = -(2**30)


class ImageFeatures(NamedTuple):
    """What SAM2 keeps of an image, whatever is asked about it; g is the side of the coarsest map."""

    s0: Float[Array, "images 4*g 4*g d_model/8"]
    s1: Float[Array, "images 2*g 2*g d_model/4"]
    image: Float[Array, "images g g d_model"]


class FramePlan(NamedTuple):
    """In which order the frames of a volume are segmented, padded to fixed lengths; made by `plan_frames`.

    The first `max_conditioning_frames` steps are the prompted frames, the others are tracked.
    """

    index: Int[np.ndarray, "steps"]
    # 0 for a prompted frame, 1 for one that is reached forward, -1 for one that is reached backward.
    direction: Int[np.ndarray, "steps"]
    # False where a step is padding.
    valid: Bool[np.ndarray, "steps"]


class FrameMasks(NamedTuple):
    """The answer for a volume, in the order of its frames; see MaskDecoding for the fields."""

    masks: Float[Array, "frames objects 4*g 4*g"]
    ious: Float[Array, "frames objects 3"]
    object_scores: Float[Array, "frames objects"]


class TrackState(NamedTuple):
    """All that is remembered: a slot for every prompted frame, then a ring of tracked ones."""

    frames: Float[Array, "slots objects N memory_dim"]
    pointers: Float[Array, "pointers objects d_model"]
    # When the frames in the two rings were seen: frame index times direction.
    frame_times: Int[Array, "ring"]
    pointer_times: Int[Array, "pointer_ring"]


def plan_frames(
    num_frames: int,
    config: Sam2Config,
    conditioning: Sequence[int] | None = None,
    padded_to: int | None = None,
) -> FramePlan:
    """Decide which frames are prompted and in which order the others are tracked.

    By default the first `max_conditioning_frames` frames are prompted and the rest is tracked in ascending
    order, as the reference does. With `conditioning` (frame indices in any order), all other frames after the
    earliest of them are tracked in ascending order, then the frames before it in descending order; this
    backward pass remembers the prompted frames and its own. A tracked frame reads the memory of all prompted
    frames, but the object pointers only of those behind it in its direction, as SAM2 does.

    `padded_to` is the number of frames the plan is laid out for, so that volumes of similar length share one
    compiled function.

    Raises:
        InputError: no frames, or conditioning frames that are too many, repeated or outside the volume.
    """
    limit = config.max_conditioning_frames
    if num_frames < 1:
        raise InputError("A volume needs at least one frame.")
    if conditioning is None:
        chosen = list(range(min(limit, num_frames)))
    else:
        chosen = sorted(int(index) for index in conditioning)
        if not 1 <= len(chosen) <= limit:
            raise InputError(f"Choose 1 to {limit} conditioning frames, not {len(chosen)}.")
        if len(set(chosen)) < len(chosen):
            raise InputError(f"Name every conditioning frame once: {chosen} repeats one.")
        if chosen[0] < 0 or chosen[-1] >= num_frames:
            raise InputError(f"Conditioning frames {chosen} must lie between 0 and {num_frames - 1}.")

    forward = [i for i in range(chosen[0], num_frames) if i not in chosen]
    backward = list(range(chosen[0] - 1, -1, -1))
    unused = limit - len(chosen)
    padding = max(padded_to or 0, num_frames) - len(forward) - len(backward)
    index = [*chosen, *[0] * unused, *forward, *backward, *[0] * padding]
    direction = [0] * limit + [1] * len(forward) + [-1] * len(backward) + [0] * padding
    valid = [True] * len(chosen) + [False] * unused + [True] * len(forward + backward) + [False] * padding
    return FramePlan(np.array(index, np.int32), np.array(direction, np.int32), np.array(valid))


class Sam2(nnx.Module):
    def __init__(self, config: Sam2Config, precision: Precision, *, rngs: nnx.Rngs):
        if config.image_size % 32:
            raise InputError(f"SAM2's image_size must be a multiple of 32, not {config.image_size}.")
        dim = config.d_model
        self.config, self.precision = config, precision
        self.image_encoder = ImageEncoder(config.hiera, dim, rngs=rngs)
        self.sam_prompt_encoder = PromptEncoder(dim, rngs=rngs)
        self.sam_mask_decoder = MaskDecoder(config, rngs=rngs)
        self.obj_ptr_proj = MLP((dim, dim, dim, dim), jax.nn.relu, rngs=rngs)
        self.memory_encoder = MemoryEncoder(config, rngs=rngs)
        self.memory_attention = MemoryAttention(config, rngs=rngs)
        self.maskmem_tpos_enc = nnx.Param(
            LINEAR_INIT(rngs.params(), (config.num_memories, config.memory_dim))
        )
        self.no_mem_embed = nnx.Param(LINEAR_INIT(rngs.params(), (dim,)))
        self.no_obj_ptr = nnx.Param(LINEAR_INIT(rngs.params(), (dim,)))
        # In the checkpoint but never read: tracked frames always have a memory, masks are never given.
        self.no_mem_pos_enc = nnx.Param(LINEAR_INIT(rngs.params(), (dim,)))
        self.mask_downsample = Conv2d(1, 1, 4, stride=4, rngs=rngs)

    def encode_image(
        self,
        pixels: UInt8[Array, "images size size 3"] | Float[Array, "images size size 3"],
        *,
        remat: str = "none",
    ) -> ImageFeatures:
        """Encode images, RGB bytes or already normalised, once for all questions about them.

        Raises:
            InputError: the images are not of the configured size.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            height, width = pixels.shape[1:3]
            raise InputError(
                f"SAM2 reads images of {size}x{size} pixels, not {height}x{width}: resize them first."
            )
        dtype = "bfloat16" if self.precision.sam2_encoder == "bfloat16" else "float32"
        level0, level1, level2 = self.image_encoder(normalize(pixels).astype(dtype), remat=remat)
        decoder = self.sam_mask_decoder
        return ImageFeatures(decoder.conv_s0(level0), decoder.conv_s1(level1), level2)

    def decode(
        self, features: ImageFeatures, language: Float[Array, "images objects d_model"]
    ) -> MaskDecoding:
        """The mask of every language vector on its image, all objects of all images in one call."""
        return self._decode(features, features.image + self.no_mem_embed[...], language)

    def _decode(self, features, image, language) -> MaskDecoding:
        dtype = self.precision.sam2_decoder
        prompts = self.sam_prompt_encoder
        shape = (image.shape[0], 1) if language is None else language.shape[:2]
        return self.sam_mask_decoder(
            image.astype(dtype),
            features.s1.astype(dtype),
            features.s0.astype(dtype),
            prompts.dense_position(image.shape[1], self.precision.bfloat16_position),
            prompts.sparse_prompt(language, shape),
            prompts.no_mask_embed[...],
        )

    def object_pointer(self, decoding: MaskDecoding) -> Float[Array, "images objects d_model"]:
        """What later frames remember of an object beside its mask; a fixed vector where it was not seen."""
        seen = decoding.object_scores[..., None] > 0
        return jnp.where(seen, self.obj_ptr_proj(decoding.mask_tokens), self.no_obj_ptr[...])

    def remember(
        self, features: ImageFeatures, decoding: MaskDecoding
    ) -> Float[Array, "images objects N memory_dim"]:
        """Memory of segmented frames, in the decoder's dtype (the reference stores bfloat16)."""
        size = (self.config.image_size, self.config.image_size)
        masks = resize_bilinear(decoding.masks[..., None], size)[..., 0]
        memory = self.memory_encoder(features.image.astype(self.precision.sam2_decoder), masks)
        return rearrange(memory, "b o r c d -> b o (r c) d")

    def track(self, features: ImageFeatures, memory: Memory) -> MaskDecoding:
        """Segment one frame by memory alone; the object axis of the result is the memory's."""
        image = features.image[0].astype(self.precision.sam2_decoder)
        decoding = self._decode(features, self.memory_attention(image, memory), None)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), decoding)

    def segment_frames(
        self,
        frames: UInt8[Array, "frames size size 3"] | Float[Array, "frames size size 3"],
        language: Float[Array, "objects d_model"],
        plan: FramePlan,
    ) -> FrameMasks:
        """Segment a volume or video: prompted frames each for itself, then the others by tracking.

        `frames` are RGB bytes at SAM2's size, or already normalised. They are encoded inside the loop, so
        that memory does not grow with their number. Nothing recompiles while the shapes stay: pad the frames
        with zeros and plan with `padded_to`; padding answers zeros.
        """
        objects = len(language)

        def segment(state, step, index, direction):
            frame = jax.lax.dynamic_index_in_dim(frames, index)
            return self.segment_step(state, normalize_fused(frame), language, plan, step, index, direction)

        @jax.checkpoint  # a gradient would keep what both branches compute, of every frame
        def body(state, inputs):
            *place, valid = inputs
            return jax.lax.cond(valid, lambda: segment(state, *place), lambda: (state, blank))

        side = 4 * self.config.grid
        blank = FrameMasks(*(jnp.zeros((objects, *shape)) for shape in ((side, side), (3,), ())))
        steps = jnp.arange(len(plan.index))
        inputs = (steps, jnp.asarray(plan.index), jnp.asarray(plan.direction), jnp.asarray(plan.valid))
        _, masks = jax.lax.scan(body, self.empty_state(objects), inputs)
        target = jnp.where(inputs[3], inputs[1], len(frames))  # padding is written nowhere

        def in_frame_order(values):
            return jnp.zeros((len(frames), *values.shape[1:])).at[target].set(values, mode="drop")

        return jax.tree.map(in_frame_order, masks)

    def segment_step(
        self,
        state: TrackState,
        frame: UInt8[Array, "1 size size 3"] | Float[Array, "1 size size 3"],
        language: Float[Array, "objects d_model"],
        plan: FramePlan,
        step: Int[Array, ""],
        index: Int[Array, ""],
        direction: Int[Array, ""],
    ) -> tuple[TrackState, FrameMasks]:
        """One step of a plan, of which only the prompted frames are read: the masks of frame `index`."""
        prompted = self.config.max_conditioning_frames
        features = self.encode_image(frame)
        decoding = jax.lax.cond(
            step < prompted,
            lambda: self.decode(features, language[None]),
            lambda: self.track(features, self.recall(state, plan, index, direction)),
        )
        memory, pointer = self.remember(features, decoding)[0], self.object_pointer(decoding)[0]
        state = store(state, memory, pointer, step, index * direction, prompted)
        return state, FrameMasks(decoding.masks[0], decoding.ious[0], decoding.object_scores[0])

    def empty_state(self, objects: int) -> TrackState:
        config = self.config
        ring, pointer_ring = config.num_memories - 1, config.max_object_pointers - 1
        slots, pointers = (config.max_conditioning_frames + n for n in (ring, pointer_ring))
        dtype = self.precision.sam2_decoder
        return TrackState(
            frames=jnp.zeros((slots, objects, config.grid**2, config.memory_dim), dtype),
            pointers=jnp.zeros((pointers, objects, config.d_model)),
            frame_times=jnp.full((ring,), NEVER),
            pointer_times=jnp.full((pointer_ring,), NEVER),
        )

    def recall(
        self, state: TrackState, plan: FramePlan, index: Int[Array, ""], direction: Int[Array, ""]
    ) -> Memory:
        """What frame `index` may read: all prompted frames, and the tracked ones just behind it.

        The temporal embedding says how far behind a tracked one lies; its last row marks the prompted ones.
        """
        prompted = self.config.max_conditioning_frames
        behind = plan.index[:prompted] * direction <= index * direction
        frame_age = index * direction - state.frame_times
        pointer_age = index * direction - state.pointer_times
        ring, pointer_ring = len(frame_age), len(pointer_age)

        table = self.maskmem_tpos_enc[...]
        time = table[jnp.clip(frame_age - 1, 0, ring - 1)]
        pointers_valid = jnp.concatenate(
            [plan.valid[:prompted] & behind, (pointer_age >= 1) & (pointer_age <= pointer_ring)]
        )
        tokens = self.config.d_model // self.config.memory_dim
        return Memory(
            frames=state.frames,
            time=jnp.concatenate([jnp.broadcast_to(table[-1], (prompted, table.shape[1])), time]),
            frames_valid=jnp.concatenate([plan.valid[:prompted], (frame_age >= 1) & (frame_age <= ring)]),
            pointers=rearrange(state.pointers, "p o (t d) -> o (p t) d", t=tokens),
            pointers_valid=jnp.repeat(pointers_valid, tokens),
        )


def store(
    state: TrackState,
    memory: Float[Array, "objects N memory_dim"],
    pointer: Float[Array, "objects d_model"],
    step: Int[Array, ""],
    time: Int[Array, ""],
    prompted: int,
) -> TrackState:
    """Put a segmented frame in its slot: prompted frames by their number, tracked ones over the oldest."""

    def put(values, times, value):
        place = time % len(times)
        values = values.at[jnp.where(step < prompted, step, prompted + place)].set(value)
        return values, times.at[place].set(jnp.where(step < prompted, times[place], time))

    frames, frame_times = put(state.frames, state.frame_times, memory)
    pointers, pointer_times = put(state.pointers, state.pointer_times, pointer)
    return TrackState(frames, pointers, frame_times, pointer_times)
