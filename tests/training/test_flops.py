"""The formula against XLA's own count of the same computation."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from small import IDS, MODEL, STEP, random_batch

from unibiomed_jax.config.model import HieraConfig, LanguageConfig, ModelConfig, Sam2Config, VisionConfig
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import partition, split
from unibiomed_jax.training import flops, lora
from unibiomed_jax.training.config import FreezeConfig
from unibiomed_jax.training.forward import count_targets
from unibiomed_jax.training.step import gradients, init_state


def test_the_full_model_costs_what_is_published():
    """GFLOP of single stages, counted by instruments on the reference."""
    config = ModelConfig()
    tile = flops.vision_tile(config.vision) / 1e9
    projector = 256 * 2 * (4096 * 896 + 896**2) / 1e9
    assert tile + projector == pytest.approx(725.9, rel=0.002)
    assert (flops.hiera_image(config.sam2) + flops.neck_image(config.sam2)) / 1e9 == pytest.approx(
        1823, rel=0.005
    )
    assert flops.mask_decoder(config.sam2) / 1e9 == pytest.approx(3.66, rel=0.03)
    assert 1900 * 2 * flops.decoder_weights(config.language) / 1e9 == pytest.approx(1359.7, rel=0.001)


# Wide enough that matrix products outweigh everything else, one layer so that a scanned body counts right.
WIDE = ModelConfig(
    vision=VisionConfig(hidden_size=256, num_layers=1, num_heads=4, mlp_dim=1024, image_size=112),
    language=LanguageConfig(
        vocab_size=2048, hidden_size=256, num_layers=1, num_heads=4, num_kv_heads=2, mlp_dim=1024
    ),
    sam2=Sam2Config(
        image_size=128,
        hiera=HieraConfig(
            embed_dim=128,
            num_heads=1,
            stages=(1, 1, 1, 1),
            global_attention_blocks=(),
            window_spec=(8, 4, 8, 4),  # that divide the maps: windows are filled up with padding otherwise
        ),
        memory_layers=1,
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "freeze",
    [
        FreezeConfig(),
        FreezeConfig(trainable=("*",), frozen=()),
        FreezeConfig(trainable=("sam2.sam_mask_decoder.*",), frozen=()),
    ],
    ids=["default", "everything", "mask decoder"],
)
def test_a_step_counts_what_xla_counts(freeze):
    loss = dataclasses.replace(STEP.loss, num_points=16, token_chunk=512)
    config = dataclasses.replace(STEP, loss=loss, freeze=freeze)

    def make():
        model = UniBiomedModel(WIDE, FLOAT32, rngs=nnx.Rngs(0))
        lora.attach(model, config.lora.targets, rank=16, alpha=16, dropout=0.0, rngs=nnx.Rngs(params=1))
        return model

    graphdef, parameters = split(nnx.eval_shape(make))
    trainable, frozen = partition(parameters, config.freeze.trainable, config.freeze.frozen)
    rows, tokens, tiles = 2, 64, 1
    batch = {
        "pixel_values": np.zeros((rows, tiles, 112, 112, 3), np.float32),
        "tile_valid": np.ones((rows, tiles), bool),
        "input_ids": np.full((rows, tokens), IDS.seg, np.int32),
        "labels": np.full((rows, tokens), 1, np.int32),
        "token_valid": np.ones((rows, tokens), bool),
        "sam_pixels": np.zeros((rows, 1, 128, 128, 3), np.float32),
        "frame_valid": np.ones((rows, 1), bool),
        "masks": np.zeros((rows, 1, 1, 32, 32), np.uint8),
        "object_valid": np.ones((rows, 1), bool),
    }

    def step(trainable, frozen, batch):
        state = init_state(trainable, config)
        counts = count_targets(batch, IDS, config.loss)
        return gradients(graphdef, config, IDS, state, frozen, batch, counts, 0)

    xla = jax.jit(step).lower(trainable, frozen, batch).cost_analysis()["flops"]
    ours = flops.step_flops(flops.forward_work(WIDE, batch, lora_rank=16), trainable)
    assert ours == pytest.approx(xla, rel=0.05)


def test_padding_is_not_counted():
    batch = random_batch(0)
    batch["tile_valid"] = np.ones(batch["pixel_values"].shape[:2], bool)
    batch["token_valid"] = np.ones(batch["input_ids"].shape, bool)
    wider = {name: np.concatenate([value, np.zeros_like(value)], axis=1) for name, value in batch.items()}
    wider["labels"][:, batch["labels"].shape[1] :] = -100
    assert flops.forward_work(MODEL, wider) == flops.forward_work(MODEL, batch)


def test_a_gradient_costs_only_where_it_passes():
    """Times that each part's forward products are computed in all."""
    work = flops.Work(*(10.0**digit for digit in range(8)))
    parts = [field.name for field in dataclasses.fields(work)]

    def times(*trainable):
        digits = f"{int(flops.step_flops(work, trainable)):08d}"[::-1]
        return dict(zip(parts, map(int, digits), strict=True))

    above_words = {"decoder": 2, "decoder_attention": 3, "adapters": 2, "head": 2, "mask_decoder": 2}
    nothing = dict.fromkeys(parts, 1)
    assert times("sam2.sam_mask_decoder.mask_tokens") == nothing | {"mask_decoder": 3}
    assert times("sam2.memory_encoder.x") == nothing | {"mask_decoder": 2}
    assert times("sam2.image_encoder.x") == nothing | {"sam2_encoder": 3, "mask_decoder": 2}
    assert times("language_model.lm_head.kernel") == nothing | {"head": 2}
    assert times("language_model.layers.x.lora.a") == nothing | above_words | {"adapters": 3}
    assert times("mlp1.linear1.kernel") == nothing | above_words | {"projector": 3}
    assert times("vision_model.x") == nothing | above_words | {"vision": 3, "projector": 2}
    assert times("vision_model.x.lora.a")["vision"] == 2
    assert times(
        "vision_model.x",
        "mlp1.x",
        "language_model.layers.x.kernel",
        "language_model.layers.x.lora.a",
        "language_model.lm_head.kernel",
        "sam2.image_encoder.x",
        "sam2.sam_mask_decoder.x",
    ) == dict.fromkeys(parts, 3)
