"""The random start: signals keep their size at any width, and the language vector is heard."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small import STEP

from unibiomed_jax import checkpoint
from unibiomed_jax.config import ModelConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.training.config import LoraConfig, TrainConfig
from unibiomed_jax.training.initialise import (
    MASK_WEIGHTS,
    NECK,
    UNTAUGHT_HEADS,
    fan_in,
    random_parameters,
    resolve_model,
    structure,
)
from unibiomed_jax.training.parameters import matches, merge


@pytest.fixture(scope="module")
def parameters():
    return {path: np.asarray(value) for path, value in random_parameters(STEP).items()}


def test_kernels_have_variance_one_over_fan_in(parameters):
    kernels = {
        path: value
        for path, value in parameters.items()
        if path.endswith(".kernel")
        and path.removesuffix(".kernel") not in (*UNTAUGHT_HEADS, MASK_WEIGHTS)
        and not matches(path, (NECK,))
    }
    assert kernels
    for path, value in kernels.items():
        spread = value.std() * fan_in(path, value.shape) ** 0.5
        assert abs(spread - 1) < 5 / np.sqrt(value.size), path


def test_fan_in_counts_what_an_output_sums_over():
    assert fan_in("language_model.lm_head.kernel", (24, 100)) == 24
    assert fan_in("sam2.image_encoder.trunk.patch_embed.kernel", (7, 7, 3, 32)) == 147
    assert fan_in("vision_model.layers.mlp.fc1.kernel", (3, 48, 96)) == 48  # three layers in one array
    assert fan_in("sam2.sam_mask_decoder.upscale_conv1.kernel", (96, 2, 2, 24)) == 96


def test_positions_are_seen_and_decoder_tokens_are_quiet(parameters):
    for path in ("sam2.image_encoder.trunk.pos_embed", "vision_model.position_embedding"):
        assert 0.4 < parameters[path].std() < 0.6, path
    for path in ("sam2.sam_mask_decoder.mask_tokens", "sam2.sam_prompt_encoder.not_a_point_embed"):
        assert parameters[path].std() < 0.05, path
    assert all((value == 1).all() for path, value in parameters.items() if path.endswith((".ls1", ".ls2")))


def test_heads_that_no_loss_reaches_start_neutral(parameters):
    for head, says in UNTAUGHT_HEADS.items():
        assert (parameters[f"{head}.kernel"] == 0).all() and (parameters[f"{head}.bias"] == says).all()


def test_masks_start_as_flat_background_and_follow_the_language_vector(parameters):
    rng = np.random.default_rng(0)
    sam2 = merge(structure(STEP)[0], parameters, {}).sam2
    size, width = STEP.model.sam2.image_size, STEP.model.sam2.d_model
    features = sam2.encode_image(rng.normal(size=(2, size, size, 3)).astype(np.float32))
    masks = np.asarray(sam2.decode(features, rng.normal(size=(2, 8, width)).astype(np.float32)).masks)
    across_pixels, across_vectors = masks.std(axis=(2, 3)).mean(), masks.std(axis=1).mean()
    assert -4 < masks.mean() < -1 and across_pixels < 2
    assert across_vectors > 0.2 * across_pixels


def test_sam2_may_see_images_of_another_size_than_those_of_the_checkpoint():
    tiny = str(Path(__file__).parents[2] / "checkpoints" / "unibiomed-tiny")
    sizes = checkpoint.read_config(tiny)

    def resized(model):
        return dataclasses.replace(model, sam2=dataclasses.replace(model.sam2, image_size=64))

    for model in (ModelConfig(), sizes):
        config = resolve_model(TrainConfig(initial=tiny, model=resized(model), lora=LoraConfig(rank=0)))
        assert config.model == resized(sizes) != sizes
    shapes = {path: value.shape for path, value in structure(config)[1].items()}
    assert shapes == {path: v.shape for path, v in checkpoint.flatten(checkpoint.load(tiny).params).items()}


def test_a_checkpoint_brings_its_sizes_and_others_are_refused_by_name():
    tiny = str(Path(__file__).parents[2] / "checkpoints" / "unibiomed-tiny")
    sizes = checkpoint.read_config(tiny)
    for model in (ModelConfig(), sizes, dataclasses.replace(ModelConfig(), max_tiles=sizes.max_tiles)):
        assert resolve_model(TrainConfig(initial=tiny, model=model)).model == sizes
    # Not the many sizes that nobody asked for, though they differ, too.
    with pytest.raises(InputError, match=r"model\.max_tiles = 6 but \S*unibiomed-tiny has 1;"):
        resolve_model(TrainConfig(initial=tiny, model=dataclasses.replace(ModelConfig(), max_tiles=6)))
