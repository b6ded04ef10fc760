"""Every size and choice of the model, as frozen dataclasses; the comment above a field documents it."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from typing import Annotated

from unibiomed_jax.config.fields import BELOW_ONE, ONE_OR_MORE, TWO_OR_MORE, require_limits
from unibiomed_jax.config.preprocessing import PREPROCESSING, Preprocessing
from unibiomed_jax.errors import InputError

# Mean and standard deviation of ImageNet's RGB on a scale of 0 to 1, which both image encoders are used to.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VisionConfig:
    """InternViT, the eye of the language model."""

    # Width of the residual stream.
    hidden_size: Annotated[int, ONE_OR_MORE] = 1024
    # Number of transformer blocks.
    num_layers: Annotated[int, ONE_OR_MORE] = 24
    # Attention heads; hidden_size must be divisible by it.
    num_heads: Annotated[int, ONE_OR_MORE] = 16
    # Width of the feed-forward layer.
    mlp_dim: Annotated[int, ONE_OR_MORE] = 4096
    # Side of a patch, pixels.
    patch_size: Annotated[int, ONE_OR_MORE] = 14
    # Side of a tile, pixels.
    image_size: Annotated[int, ONE_OR_MORE] = 448
    # Bias on the fused query-key-value projection.
    qkv_bias: bool = True
    # Epsilon of the two layer norms of a block.
    layer_norm_eps: float = 1e-6
    # Stochastic depth of the last block during training (linear from 0 at the first).
    drop_path_rate: Annotated[float, BELOW_ONE] = 0.0

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2.5 decoder."""

    # Number of token ids the tokenizer knows.
    vocab_size: Annotated[int, ONE_OR_MORE] = 151_679
    # Width of the residual stream.
    hidden_size: Annotated[int, ONE_OR_MORE] = 896
    # Number of decoder blocks.
    num_layers: Annotated[int, ONE_OR_MORE] = 24
    # Query heads.
    num_heads: Annotated[int, ONE_OR_MORE] = 14
    # Key-value heads; query head h reads key-value head h * num_kv_heads // num_heads.
    num_kv_heads: Annotated[int, ONE_OR_MORE] = 2
    # Width of the gated feed-forward layer.
    mlp_dim: Annotated[int, ONE_OR_MORE] = 4864
    # Base of the rotary position angles.
    rope_theta: float = 1e6
    # Epsilon of the RMS norms.
    rms_norm_eps: float = 1e-6
    # The output head is the embedding table itself.
    tie_word_embeddings: bool = False
    # Longest sequence, tokens.
    max_position_embeddings: Annotated[int, ONE_OR_MORE] = 32_768
    # The embedding and the head are padded to a multiple of this, so that they shard evenly.
    vocab_multiple: Annotated[int, ONE_OR_MORE] = 128

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding inside the model; ids at or above vocab_size are never produced."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class HieraRun:
    """A maximal run of equal Hiera blocks, computed by one scan."""

    # Index of its first block in the checkpoint.
    first: int
    # Number of blocks.
    count: int
    # Channels entering and leaving a block.
    dim_in: int
    dim_out: int
    # Attention heads.
    num_heads: int
    # Side of an attention window on the incoming grid; 0 is global attention.
    window: int
    # The queries are max-pooled 2x2, which halves the grid.
    pools: bool


@dataclass(frozen=True)
class HieraConfig:
    """Hiera, the trunk of SAM2's image encoder."""

    # Channels after the patch embedding; doubled at every later stage.
    embed_dim: Annotated[int, ONE_OR_MORE] = 144
    # Heads in the first stage; doubled at every later stage.
    num_heads: Annotated[int, ONE_OR_MORE] = 2
    # Blocks in each of the four stages.
    stages: tuple[int, ...] = (2, 6, 36, 4)
    # Blocks that attend globally instead of in windows.
    global_attention_blocks: tuple[int, ...] = (23, 33, 43)
    # Window side per stage.
    window_spec: tuple[int, ...] = (8, 4, 16, 8)
    # Grid of the coarse position table before it is resized (rows, columns).
    position_grid: tuple[int, int] = (7, 7)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Index of the last block of every stage."""
        return tuple(sum(self.stages[: i + 1]) - 1 for i in range(len(self.stages)))

    @property
    def stage_dims(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**i for i in range(len(self.stages)))

    def runs(self) -> tuple[HieraRun, ...]:
        """Group the blocks into runs of equal ones; a stage's end also ends a run.

        The first block of a stage still works in the window of the stage before it (it pools on the way
        out), exactly as SAM2 defines it.
        """
        runs: list[HieraRun] = []
        index = 0
        for stage, depth in enumerate(self.stages):
            for position in range(depth):
                enters = stage > 0 and position == 0
                window = self.window_spec[stage - 1] if enters else self.window_spec[stage]
                if index in self.global_attention_blocks:
                    window = 0
                block = HieraRun(
                    first=index,
                    count=1,
                    dim_in=self.stage_dims[stage - 1] if enters else self.stage_dims[stage],
                    dim_out=self.stage_dims[stage],
                    num_heads=self.num_heads * 2**stage,
                    window=window,
                    pools=enters,
                )
                last = runs[-1] if runs and position > 0 else None
                if last and dataclasses.replace(last, first=index, count=1) == block:
                    runs[-1] = dataclasses.replace(last, count=last.count + 1)
                else:
                    runs.append(block)
                index += 1
        return tuple(runs)


@dataclass(frozen=True)
class Sam2Config:
    """SAM2: image encoder, prompt encoder, mask decoder, and the memory that follows an object."""

    # Side of the square image SAM2 sees, pixels.
    image_size: Annotated[int, ONE_OR_MORE] = 1024
    # The trunk.
    hiera: HieraConfig = field(default_factory=HieraConfig)
    # Width of the mask decoder and of the memory attention.
    d_model: Annotated[int, ONE_OR_MORE] = 256
    # Heads and feed-forward width of the two-way transformer.
    decoder_heads: Annotated[int, ONE_OR_MORE] = 8
    decoder_mlp_dim: Annotated[int, ONE_OR_MORE] = 2048
    # Channels of a stored memory.
    memory_dim: Annotated[int, ONE_OR_MORE] = 64
    # Depth and feed-forward width of the memory attention.
    memory_layers: Annotated[int, ONE_OR_MORE] = 4
    memory_mlp_dim: Annotated[int, ONE_OR_MORE] = 2048
    # Memories kept of tracked frames plus one (the size of the temporal embedding).
    num_memories: Annotated[int, TWO_OR_MORE] = 7
    # Frames whose object pointer is read.
    max_object_pointers: Annotated[int, TWO_OR_MORE] = 16
    # Frames at the start of a volume that are prompted by the language model.
    max_conditioning_frames: Annotated[int, ONE_OR_MORE] = 5

    @property
    def grid(self) -> int:
        """Side of the feature map that the mask decoder reads (stride 16)."""
        return self.image_size // 16


@dataclass(frozen=True)
class ModelConfig:
    """The whole model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    sam2: Sam2Config = field(default_factory=Sam2Config)
    # Side of the space-to-depth that turns patches into tokens, as a ratio (0.5: 2x2 patches a token).
    downsample_ratio: float = 0.5
    # "v2": ordinary space-to-depth; "v1": the same with rows and columns swapped.
    ps_version: str = "v2"
    # Limits of the number of tiles an image is cut into.
    min_tiles: Annotated[int, ONE_OR_MORE] = 1
    max_tiles: Annotated[int, ONE_OR_MORE] = 12
    # Append the whole image as a last tile when there is more than one.
    use_thumbnail: bool = True
    # Name of the conversation template.
    template: str = "phi3_chat"
    # How slices of studies looked in training: windows, orientation, padding. A checkpoint that says nothing
    # about it is taken to have seen what the released weights saw.
    preprocessing: Preprocessing = PREPROCESSING["released"]

    @property
    def token_grid(self) -> int:
        """Language-model tokens along one side of a tile."""
        return int(self.vision.grid * self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return self.token_grid**2


# Nothing, everything, or everything but products with weights.
Remat = typing.Literal["none", "full", "dots"]


@dataclass(frozen=True)
class RematConfig:
    """What the backward pass computes again instead of keeping, by part."""

    # InternViT (matters only where it trains).
    vision: Remat = "none"
    # The language model.
    language: Remat = "full"
    # SAM2's image encoder (matters only where it trains).
    sam2_encoder: Remat = "none"


# What training without a memory limit computes again: nothing.
NO_REMAT = RematConfig(vision="none", language="none", sam2_encoder="none")

# Sizes of which one is a multiple of another one (times a number), or of a number alone.
MULTIPLES = (
    ("vision.hidden_size", 1, "vision.num_heads"),
    ("vision.image_size", 1, "vision.patch_size"),
    # Rotary positions turn pairs of a head's channels.
    ("language.hidden_size", 2, "language.num_heads"),
    ("language.num_heads", 1, "language.num_kv_heads"),
    ("sam2.hiera.embed_dim", 1, "sam2.hiera.num_heads"),
    # Attention to the image has half the width, the mask decoder's finest map an eighth of it.
    ("sam2.d_model", 2, "sam2.decoder_heads"),
    ("sam2.d_model", 8, None),
    # Object pointers are cut into tokens as wide as a memory, whose position has a half for rows.
    ("sam2.d_model", 1, "sam2.memory_dim"),
    ("sam2.memory_dim", 2, None),
)


def require_fitting(model: ModelConfig) -> None:
    """Refuse sizes that no model can have, each for itself or beside each other.

    Raises:
        InputError: names the size and what it must be.
    """

    def get(name: str):
        return functools.reduce(getattr, name.split("."), model)

    require_limits(model, "model.")
    for name, times, other in MULTIPLES:
        if get(name) % (times * (get(other) if other else 1)):
            factors = [str(times)] * (times > 1) + ([f"model.{other}={get(other)}"] if other else [])
            raise InputError(f"model.{name}={get(name)} must be a multiple of {' * '.join(factors)}.")
    ratio, grid = model.downsample_ratio, model.vision.grid
    fold = round(1 / ratio) if 0 < ratio <= 1 else 0
    if not fold or 1 / fold != ratio or grid % fold:
        raise InputError(
            f"model.downsample_ratio={ratio} must be 1/n, where n divides {grid} (model.vision.image_size / "
            "patch_size)."
        )
    hiera = model.sam2.hiera
    if not len(hiera.stages) == len(hiera.window_spec) == 4 or min(hiera.stages) < 1:
        raise InputError(
            "model.sam2.hiera must have four stages of one or more blocks, and four windows in window_spec."
        )
    *pooled, last = hiera.window_spec
    if last < 1 or any(window < 2 or window % 2 for window in pooled):
        raise InputError(
            f"model.sam2.hiera.window_spec={hiera.window_spec} must be above 0, its first three even."
        )
    if model.sam2.image_size // 4 % pooled[0]:
        raise InputError(
            f"model.sam2.image_size={model.sam2.image_size} must be a multiple of {4 * pooled[0]}, four "
            "times the first window of model.sam2.hiera."
        )
