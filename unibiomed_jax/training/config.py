"""Every choice of a training run, as frozen dataclasses. The comment above a field is its documentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from unibiomed_jax.config.fields import ABOVE_ZERO, BELOW_ONE, ONE_OR_MORE, SEED, SHARE, ZERO_OR_MORE
from unibiomed_jax.config.model import ModelConfig, RematConfig
from unibiomed_jax.config.precision import Dtype, Precision
from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.records import DatasetConfig
from unibiomed_jax.distributed import Processes
from unibiomed_jax.training.lora import DECODER_LAYERS


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters."""

    # Rank of the update; 0 attaches no adapter. (Full fine-tuning: rank 0, and freeze.trainable "*".)
    rank: Annotated[int, ZERO_OR_MORE] = 128
    # The update is scaled by alpha / rank.
    alpha: Annotated[float, ABOVE_ZERO] = 256.0
    # Dropout on the adapter's input; in the language model alone.
    dropout: Annotated[float, BELOW_ONE] = 0.05
    # Linear layers that get one, as patterns over their paths.
    targets: tuple[str, ...] = DECODER_LAYERS


@dataclass(frozen=True)
class LossConfig:
    """Losses: token cross-entropy + mask_weight * mask cross-entropy + dice_weight * dice."""

    # Weight of the sigmoid cross-entropy of mask points.
    mask_weight: Annotated[float, ZERO_OR_MORE] = 2.0
    # Weight of the dice distance.
    dice_weight: Annotated[float, ZERO_OR_MORE] = 0.5
    # Points at which a mask is compared.
    num_points: Annotated[int, ONE_OR_MORE] = 12_544
    # Candidates drawn per point that is chosen for its uncertainty.
    oversample: Annotated[float, ONE_OR_MORE] = 3.0
    # Share of the points chosen where the prediction is least sure.
    importance: Annotated[float, SHARE] = 0.75
    # Rows a frame, filled by repeating its objects, or by a random choice of more (the reference: 5); none:
    # every object once, which is equal in expectation for one object and a fifth of the work.
    copies: Annotated[int | None, ONE_OR_MORE] = None
    # Segment the frames of a sequence after SAM2's conditioning frames by following the object, as inference
    # does, which trains the memory. The reference prompts every frame and leaves the memory as it was.
    follow: bool = False
    # Update from which on masks are learned; before it, only words. A mask decoder from random parameters
    # that starts while [SEG] says nothing yet learns to drown it, and stays deaf.
    masks_from: Annotated[int, ZERO_OR_MORE] = 0
    # Positions a row whose logits exist at one time.
    token_chunk: Annotated[int, ONE_OR_MORE] = 256


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay. Steps are updates of the parameters."""

    # Highest learning rate.
    lr: Annotated[float, ABOVE_ZERO] = 4e-5
    # Updates in the whole run.
    steps: Annotated[int, ONE_OR_MORE] = 10_000
    # Share of the run in which the learning rate rises.
    warmup: Annotated[float, BELOW_ONE] = 0.05
    # The learning rate starts at this times the highest.
    warmup_start: Annotated[float, SHARE] = 1e-5
    # Decay rates of the two moments.
    beta1: Annotated[float, BELOW_ONE] = 0.9
    beta2: Annotated[float, BELOW_ONE] = 0.999
    # Added to the root of the second moment.
    eps: Annotated[float, ABOVE_ZERO] = 1e-8
    # Decoupled weight decay, on every trainable tensor as in the reference: norms, biases and embeddings too.
    weight_decay: Annotated[float, ZERO_OR_MORE] = 0.05
    # Largest global norm of the gradient.
    clip: Annotated[float, ABOVE_ZERO] = 1.0
    # Batches whose gradients are summed into one update.
    accumulate: Annotated[int, ONE_OR_MORE] = 4
    # Decay of the running average of the trainable parameters; none keeps no average.
    ema: Annotated[float | None, BELOW_ONE] = None


@dataclass(frozen=True)
class FreezeConfig:
    """What trains, as patterns over parameter paths ("*" is everything). `frozen` wins over `trainable`."""

    # What gets gradients and optimiser state; kept in float32.
    trainable: tuple[str, ...] = (
        "*.lora.*",
        "language_model.embed_tokens",
        "language_model.lm_head.kernel",
        "mlp1.*",
        "text_hidden_fcs.*",
        "sam2.sam_mask_decoder.*",
        "sam2.sam_prompt_encoder.*",
    )
    # The fixed random draw behind dense positions, and parts no loss reaches: decay alone would shrink them.
    frozen: tuple[str, ...] = (
        "sam2.sam_prompt_encoder.positional_encoding_gaussian_matrix",
        "sam2.sam_prompt_encoder.point_embeddings",
        "sam2.sam_prompt_encoder.mask_downscaling.*",
        "sam2.sam_mask_decoder.iou_prediction_head.*",
        "sam2.sam_mask_decoder.pred_obj_score_head.*",
    )
    # Storage of what is frozen; "float32" keeps a checkpoint's last bits.
    frozen_dtype: Dtype = "bfloat16"


# What the reference gives to its optimiser. No loss reaches the memory, which then only decays.
REFERENCE_FREEZE = FreezeConfig(
    trainable=(*FreezeConfig().trainable, "sam2.memory_encoder.*", "sam2.memory_attention.*"),
    frozen=("sam2.sam_prompt_encoder.positional_encoding_gaussian_matrix",),
)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from."""

    # Updates between two checkpoints.
    every: Annotated[int, ONE_OR_MORE] = 500
    # Newest checkpoints that stay.
    keep_last: Annotated[int, ONE_OR_MORE] = 3
    # Best checkpoints that stay beside them, by `best`; a new best one is saved at once.
    keep_best: Annotated[int, ZERO_OR_MORE] = 1
    # Validation measure that says which is best (higher is better).
    best: str = "dice"
    # Store the frozen parameters too, so that a run resumes without the checkpoint it started from.
    save_frozen: bool = False


@dataclass(frozen=True)
class LogConfig:
    """What a run writes about itself."""

    # Updates between two lines of the log.
    every: Annotated[int, ONE_OR_MORE] = 10
    # Updates between two validations; 0 never validates.
    validate_every: Annotated[int, ZERO_OR_MORE] = 500
    # Batches a validation reads at most, the same ones every time: first one of every shape, then shapes in
    # proportion, each with its datasets mixed.
    validate_batches: Annotated[int, ONE_OR_MORE] = 50
    # Pictures of predicted masks a validation keeps; of several processes the first draws its own samples.
    overlays: Annotated[int, ZERO_OR_MORE] = 4
    # Write TensorBoard files beside the JSON lines (needs the `tensorboard` extra).
    tensorboard: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """A whole experiment."""

    # Folder of the run: checkpoints, logs, pictures, the finished model. The same command goes on in it.
    folder: str = "runs/unnamed"
    # Converted checkpoint to start from; none starts from random parameters.
    initial: str | None = None
    # Sizes of the model; left out where `initial` brings them.
    model: ModelConfig = field(default_factory=ModelConfig)
    # Folder of the tokenizer's files; that of `initial` if not given.
    tokenizer: str | None = None
    # Compute dtype of every part.
    precision: Precision = field(default_factory=Precision)
    # Training data. Sizes of the arrays follow from the model.
    data: PipelineConfig = field(default_factory=lambda: PipelineConfig(datasets=()))
    # Validation data, each sample at most once; none validates nothing.
    validation: tuple[DatasetConfig, ...] = ()
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    remat: RematConfig = field(default_factory=RematConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    # How parameters and batches are spread over the devices: a name in `sharding.strategies.STRATEGIES`.
    strategy: str = "data_parallel"
    # Devices along the axes of the mesh, such as "fsdp=4,tensor=2"; by default all along the one axis that
    # the strategy divides over.
    mesh: str | None = None
    # Random parameters, dropout and sampling points (the data has its own seed).
    seed: Annotated[int, SEED] = 42
    # Updates in a row that may fail with a loss that is not finite before the run stops.
    max_bad_steps: Annotated[int, ONE_OR_MORE] = 5
    # Number format in which the finished model is stored.
    export_dtype: Dtype = "float32"


@dataclass(frozen=True)
class Acts(Processes):
    """What `train.py` does with an experiment beside, or instead of, training it, and in which processes."""

    # Compile the step of the heaviest batch and print the memory it needs, without training.
    dry_run: bool = False
    # With --dry-run: compile for these chips instead, which need not exist, and print the plan of the run
    # (v5p:4x4x4, v5e:16x16@2, h100:8; see `unibiomed plan --help`).
    topology: str | None = None
    # Record a trace of updates 10 to 14 for TensorBoard or Perfetto.
    profile: bool = False
    # Write the model of a checkpoint ("last", "best" or a step) and stop.
    export: str | None = None
