"""InternViT and the projector against transformers' torch modules with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import LanguageConfig, ModelConfig, VisionConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.internvit import InternVisionModel, drop_path
from unibiomed_jax.models.layers import unstack_layers
from unibiomed_jax.models.projector import Projector, pixel_shuffle

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from internvl_torch import internvit_leaves, projector_leaves, torch_internvl  # noqa: E402
from measured import assert_all_close, assert_close  # noqa: E402
from module_checks import load, value_and_gradients  # noqa: E402
from torch_weights import arrays, gradients, randomise  # noqa: E402

from unibiomed_jax.conversion.oracles.language import torch_vision  # noqa: E402

CONFIG = VisionConfig(hidden_size=48, num_layers=3, num_heads=4, mlp_dim=96, patch_size=4, image_size=24)
# The projector ends in the width of a language model.
MODEL = ModelConfig(
    vision=CONFIG,
    language=LanguageConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16
    ),
)
TOKENS = 1 + CONFIG.grid**2


def pair(config, seed=0):
    """The torch model and ours with the same random weights."""
    theirs = randomise(torch_vision(config), seed)
    ours = InternVisionModel(config, rngs=nnx.Rngs(0))
    return theirs, load(ours, internvit_leaves(arrays(theirs.state_dict()), config))


def random_pixels(seed=1, tiles=2):
    side = CONFIG.image_size
    return np.random.default_rng(seed).standard_normal((tiles, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_output_and_gradients_equal_torch(qkv_bias, remat):
    config = dataclasses.replace(CONFIG, qkv_bias=qkv_bias)
    theirs, ours = pair(config)
    pixels = random_pixels()
    cotangent = np.random.default_rng(2).standard_normal((2, TOKENS, config.hidden_size)).astype(np.float32)

    torch_pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), requires_grad=True)
    expected = theirs(torch_pixels).last_hidden_state
    (expected * torch.tensor(cotangent)).sum().backward()

    result, grads, pixel_grad = value_and_gradients(
        ours, lambda model, x: model(x, remat=remat), pixels, cotangent
    )
    assert_close(result, expected, 1e-5)
    assert_close(pixel_grad, torch_pixels.grad.permute(0, 2, 3, 1), 1e-5)
    assert_all_close(grads, internvit_leaves(gradients(theirs), config), 1e-5)


def test_a_list_of_layers_equals_the_stack():
    _, model = pair(CONFIG)
    stacked = model(random_pixels())
    model.layers = unstack_layers(model.layers)
    assert_close(model(random_pixels()), stacked, 1e-6)


def test_bfloat16_is_as_near_to_float32_as_torch():
    theirs, ours = pair(CONFIG)
    pixels = random_pixels()
    torch_pixels = torch.tensor(pixels.transpose(0, 3, 1, 2))
    with torch.no_grad():
        exact = theirs(torch_pixels).last_hidden_state.numpy()
        rounded = theirs.bfloat16()(torch_pixels.bfloat16()).last_hidden_state.float().numpy()
    result = ours(jnp.asarray(pixels, jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    error = np.abs(np.asarray(result, np.float32) - exact).mean()
    assert 0 < error <= 1.1 * np.abs(rounded - exact).mean()


def test_stochastic_depth_drops_whole_branches():
    x = jnp.ones((1000, 2, 3))
    dropped = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)))
    assert ((dropped == 0).all((1, 2)) | np.isclose(dropped, 4 / 3).all((1, 2))).all()
    assert abs((dropped[:, 0, 0] == 0).mean() - 0.25) < 0.05
    assert (drop_path(x, jnp.float32(0.25), None) == x).all()


def test_stochastic_depth_needs_a_rate_and_a_key():
    model = InternVisionModel(dataclasses.replace(CONFIG, drop_path_rate=0.9), rngs=nnx.Rngs(0))
    plain, key = model(random_pixels()), jax.random.key(0)
    assert not np.allclose(model(random_pixels(), drop_path_key=key), plain)
    model.config = CONFIG
    assert (model(random_pixels(), drop_path_key=key) == plain).all()


def test_other_tile_sizes_are_refused():
    model = InternVisionModel(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="24x24 pixels, not 28x24"):
        model(np.zeros((1, 28, 24, 3), np.float32))


@pytest.fixture(scope="module")
def internvl():
    return randomise(torch_internvl(MODEL), 3)


def test_pixel_shuffle_equals_torch(internvl):
    x = np.random.default_rng(4).standard_normal((2, 6, 6, 8)).astype(np.float32)
    expected = internvl.model.pixel_shuffle(torch.tensor(x), 0.5).numpy()
    assert (np.asarray(pixel_shuffle(x)) == expected).all()
    assert (np.asarray(pixel_shuffle(x, version="v1")) == expected.swapaxes(1, 2)).all()


def test_pixel_shuffle_places_rows_before_columns():
    x = np.arange(16).reshape(1, 4, 4, 1)
    assert pixel_shuffle(x)[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert pixel_shuffle(x, version="v1")[0, 0].tolist() == [[0, 1, 4, 5], [8, 9, 12, 13]]


def test_pixel_shuffle_refuses_what_it_cannot_fold():
    with pytest.raises(InputError, match="5x4 patch grid"):
        pixel_shuffle(jnp.zeros((1, 5, 4, 1)))
    with pytest.raises(InputError, match="'v3'"):
        pixel_shuffle(jnp.zeros((1, 4, 4, 1)), version="v3")


def test_projector_equals_torch(internvl):
    theirs = internvl.model.multi_modal_projector
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 9, 4 * CONFIG.hidden_size)).astype(np.float32)
    cotangent = rng.standard_normal((2, 9, 32)).astype(np.float32)
    torch_x = torch.tensor(x, requires_grad=True)
    theirs.zero_grad()
    expected = theirs(torch_x)
    (expected * torch.tensor(cotangent)).sum().backward()

    ours = Projector(4 * CONFIG.hidden_size, 32, rngs=nnx.Rngs(0))
    load(ours, projector_leaves(arrays(theirs.state_dict()), MODEL))
    result, grads, x_grad = value_and_gradients(ours, lambda model, x: model(x), x, cotangent)
    assert_close(result, expected, 1e-5)
    assert_close(x_grad, torch_x.grad, 1e-5)
    assert_all_close(grads, projector_leaves(gradients(theirs), MODEL), 1e-5)
