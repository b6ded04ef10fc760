"""The Qwen2 decoder against transformers' torch module with random weights, and its cache against itself."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.config.presets import LANGUAGE_MODELS
from unibiomed_jax.models.layers import unstack_layers
from unibiomed_jax.models.qwen2 import Qwen2

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from internvl_torch import qwen2_leaves  # noqa: E402
from measured import assert_all_close, assert_close  # noqa: E402
from module_checks import decode, load, value_and_gradients  # noqa: E402
from torch_weights import arrays, gradients, randomise  # noqa: E402

from unibiomed_jax.conversion.oracles.language import torch_language  # noqa: E402

CONFIG = LanguageConfig(
    vocab_size=67,
    hidden_size=56,
    num_layers=3,
    num_heads=14,
    num_kv_heads=2,
    mlp_dim=72,
    rope_theta=1e4,
    vocab_multiple=16,
)
# The language models of the Sa2VA family by (query heads, key-value heads).
FAMILY = {"0.5B": (14, 2), "1.5B": (12, 2), "3B": (16, 2), "7B": (28, 4), "14B": (40, 8)}


def pair(config, seed=0):
    """The torch model and ours with the same random weights; the padded rows hold values that would win."""
    theirs = randomise(torch_language(config), seed)
    ours = Qwen2(config, rngs=nnx.Rngs(0))
    return theirs, load(ours, qwen2_leaves(arrays(theirs.state_dict()), config, padding=1e3))


def random_ids(batch, tokens, seed=1):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, tokens))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_output_and_gradients_equal_torch(tied, remat):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    theirs, ours = pair(config)
    ids = random_ids(2, 11)
    rng = np.random.default_rng(2)
    visual = rng.standard_normal((2, 11, config.hidden_size)).astype(np.float32)
    cotangent = rng.standard_normal((2, 11, config.vocab_size)).astype(np.float32)

    torch_visual = torch.tensor(visual, requires_grad=True)
    embeds = theirs.model.embed_tokens(torch.tensor(ids)) + torch_visual
    expected = theirs(inputs_embeds=embeds, output_hidden_states=True)
    (expected.logits * torch.tensor(cotangent)).sum().backward()

    result, grads, visual_grad = value_and_gradients(
        ours, lambda model, x: model.logits(model(model.embed(ids) + x, remat=remat)), visual, cotangent
    )
    assert_close(ours(ours.embed(ids) + visual), expected.hidden_states[-1], 1e-5)
    assert_close(result, expected.logits, 1e-5)
    assert_close(visual_grad, torch_visual.grad, 1e-5)
    assert_all_close(grads, qwen2_leaves(gradients(theirs), config, padding=0), 1e-5)


@pytest.mark.parametrize("size", FAMILY)
def test_every_size_of_the_family_equals_torch(size):
    heads, kv_heads = FAMILY[size]
    preset = LANGUAGE_MODELS[f"qwen2.5-{size.lower()}"]
    assert (preset.num_heads, preset.num_kv_heads) == (heads, kv_heads)
    config = dataclasses.replace(
        CONFIG,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=4 * heads,
        tie_word_embeddings=size == "3B",
    )
    theirs, ours = pair(config)
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits
    assert_close(ours.logits(ours(ours.embed(ids))), expected, 1e-5)


def test_padding_changes_nothing():
    theirs, model = pair(CONFIG)
    ids = random_ids(2, 10)
    valid = np.arange(10) < np.array([[10], [6]])
    with torch.no_grad():
        expected = theirs.model(
            torch.tensor(ids), attention_mask=torch.tensor(valid)
        ).last_hidden_state.numpy()
    for token_valid in (valid, None):
        hidden = model(model.embed(ids), token_valid=token_valid)
        assert_close(hidden[0], expected[0], 1e-5)
        assert_close(hidden[1, :6], expected[1, :6], 1e-5)

    # On the left, padding has to be masked and the positions have to start after it.
    left = np.concatenate([random_ids(1, 4, seed=9)[0], ids[1, :6]])[None]
    positions = np.maximum(np.arange(10) - 4, 0)[None]
    hidden = model(model.embed(left), positions=positions, token_valid=positions + 4 == np.arange(10))
    assert_close(hidden[0, 4:], expected[1, :6], 1e-5)


@pytest.mark.parametrize("layout", ["stack", "list"])
def test_cached_decoding_equals_the_whole_sequence(layout):
    theirs, model = pair(CONFIG)
    if layout == "list":
        model.layers = unstack_layers(model.layers)
    ids, lengths, steps = random_ids(3, 16), [9, 4, 1], 6
    embeds = model.embed(ids)
    hiddens = decode(model, embeds, lengths, steps, slots=15)
    with torch.no_grad():
        expected = theirs.model(torch.tensor(ids)).last_hidden_state.numpy()
    whole = np.asarray(model(embeds))
    for row, length in enumerate(lengths):
        assert_close(hiddens[row], expected[row, length - 1 : length + steps], 1e-5)
        assert_close(hiddens[row], whole[row, length - 1 : length + steps], 1e-5)
        alone = decode(model, embeds[row : row + 1], [length], steps, slots=length + steps)[0]
        assert_close(alone, hiddens[row], 1e-6)


def test_padded_vocabulary_never_wins():
    theirs, model = pair(CONFIG)
    hidden = np.ones((1, CONFIG.hidden_size), np.float32)
    logits = model.logits(hidden)
    assert logits.shape == (1, 67) and model.embed_tokens[...].shape == (80, 56)
    with torch.no_grad():
        assert_close(logits, theirs.lm_head(torch.tensor(hidden)), 1e-5)


def test_bfloat16_is_as_near_to_float32_as_torch():
    theirs, ours = pair(CONFIG)
    ids = random_ids(4, 24)
    with torch.no_grad():
        exact = theirs(torch.tensor(ids)).logits.numpy()
        rounded = theirs.bfloat16()(torch.tensor(ids)).logits.float().numpy()
    hidden = ours(ours.embed(ids).astype(jnp.bfloat16))
    logits = ours.logits(hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert (logits == logits.astype(jnp.bfloat16)).all(), "greedy ties are decided on rounded logits"
    error = np.abs(np.asarray(logits) - exact).mean()
    assert 0 < error <= 1.1 * np.abs(rounded - exact).mean()
