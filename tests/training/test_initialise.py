"""The random start: signals keep their size at any width, and the language vector is heard."""

import dataclasses

import numpy as np
import places
import pytest
from small import STEP

from unibiomed_jax import checkpoint
from unibiomed_jax.config.model import ModelConfig, require_fitting
from unibiomed_jax.config.presets import MODELS, SAM2_VARIANTS
from unibiomed_jax.errors import InputError
from unibiomed_jax.parameters import flatten, matches, merge, partition
from unibiomed_jax.training.config import FreezeConfig, LoraConfig, TrainConfig
from unibiomed_jax.training.initialise import (
    MASK_WEIGHTS,
    NECK,
    UNTAUGHT_HEADS,
    fan_in,
    random_parameters,
    structure,
)
from unibiomed_jax.training.start import resolve_model

pytestmark = pytest.mark.slow

TINY = str(places.TINY)


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
    sizes = checkpoint.read_config(TINY)

    def resized(model):
        return dataclasses.replace(model, sam2=dataclasses.replace(model.sam2, image_size=64))

    for model in (ModelConfig(), sizes):
        config = resolve_model(TrainConfig(initial=TINY, model=resized(model), lora=LoraConfig(rank=0)))
        assert config.model == resized(sizes) != sizes
    shapes = {path: value.shape for path, value in structure(config)[1].items()}
    assert shapes == {path: v.shape for path, v in flatten(checkpoint.load(TINY).params).items()}


def test_a_checkpoint_brings_its_sizes_and_others_are_refused_by_name():
    sizes = checkpoint.read_config(TINY)
    for model in (ModelConfig(), sizes, dataclasses.replace(ModelConfig(), max_tiles=sizes.max_tiles)):
        assert resolve_model(TrainConfig(initial=TINY, model=model)).model == sizes
    # Not the many sizes that nobody asked for, though they differ, too.
    with pytest.raises(InputError, match=r"model\.max_tiles = 6 but \S*unibiomed-tiny has 1;"):
        resolve_model(TrainConfig(initial=TINY, model=dataclasses.replace(ModelConfig(), max_tiles=6)))


@pytest.mark.parametrize(
    "lora, freeze",
    [
        (LoraConfig(rank=16), FreezeConfig()),
        (LoraConfig(rank=0), FreezeConfig()),
        (LoraConfig(rank=0), FreezeConfig(trainable=("*",), frozen=())),
    ],
)
def test_a_model_of_tied_words_is_trained_by_the_default_patterns_or_whole(lora, freeze):
    config = resolve_model(TrainConfig(initial=TINY, lora=lora, freeze=freeze))
    trainable, frozen = partition(structure(config)[1], freeze.trainable, freeze.frozen)
    assert "language_model.embed_tokens" in trainable
    assert any(".lora." in path for path in trainable) == bool(lora.rank)
    assert bool(frozen) == (freeze == FreezeConfig())


@pytest.mark.parametrize("contents", ["checkpoints/00000002/manifest.json", "config.json", "log.jsonl"])
def test_a_folder_of_something_else_is_no_start(tmp_path, contents):
    """The folder of a run, or of a release."""
    (tmp_path / contents).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / contents).write_text("{}")
    with pytest.raises(InputError, match=r"is no converted checkpoint; .*convert from-torch`.*RUN/model"):
        resolve_model(TrainConfig(initial=str(tmp_path)))


def changed(model, name, value):
    first, _, rest = name.partition(".")
    value = changed(getattr(model, first), rest, value) if rest else value
    return dataclasses.replace(model, **{first: value})


@pytest.mark.parametrize(
    "name, value, pattern",
    [
        ("language.num_heads", 3, r"model\.language\.hidden_size=896 .* 2 \* model\.language\.num_heads=3\."),
        ("language.num_kv_heads", 3, r"num_heads=14 .* multiple of model\.language\.num_kv_heads=3\."),
        ("language.num_heads", 0, r"model\.language\.num_heads=0 is impossible; give 1 or more\."),
        ("vision.num_heads", 3, r"hidden_size=1024 .* multiple of model\.vision\.num_heads=3\."),
        ("vision.image_size", 30, r"image_size=30 .* multiple of model\.vision\.patch_size=14\."),
        ("vision.image_size", 42, r"downsample_ratio=0\.5 must be 1/n, where n divides 3 "),
        ("downsample_ratio", 0.3, r"downsample_ratio=0\.3 must be 1/n, where n divides 32 "),
        ("downsample_ratio", 0.0, r"downsample_ratio=0\.0 must be"),
        ("sam2.decoder_heads", 6, r"d_model=256 .* multiple of 2 \* model\.sam2\.decoder_heads=6\."),
        ("sam2.d_model", 260, r"d_model=260 must be a multiple of "),
        ("sam2.memory_dim", 48, r"d_model=256 .* multiple of model\.sam2\.memory_dim=48\."),
        ("sam2.num_memories", 1, r"num_memories=1 is impossible; give 2 or more\."),
        ("sam2.hiera.num_heads", 5, r"embed_dim=144 .* multiple of model\.sam2\.hiera\.num_heads=5\."),
        ("sam2.hiera.stages", (2, 6, 36), "four stages"),
        ("sam2.hiera.window_spec", (8, 7, 16, 8), r"window_spec=\(8, 7, 16, 8\) .* even"),
        (
            "sam2.hiera.window_spec",
            (10, 4, 16, 8),
            r"image_size=1024 must be a multiple of 40, four times the first window",
        ),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(name, value, pattern):
    with pytest.raises(InputError, match=pattern):
        resolve_model(TrainConfig(model=changed(ModelConfig(), name, value)))


def test_sizes_that_are_known_fit():
    for model in (STEP.model, checkpoint.read_config(TINY), *MODELS.values()):
        require_fitting(model)
    for sam2 in SAM2_VARIANTS.values():
        require_fitting(dataclasses.replace(ModelConfig(), sam2=sam2))
