"""Adapters against peft: the same forward pass, the same merge, and a folder that peft loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.conversion.peft import save_peft_adapter
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.parameters import merge, merge_adapters, split
from unibiomed_jax.training import lora

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from internvl_torch import qwen2_leaves  # noqa: E402
from measured import assert_close  # noqa: E402
from module_checks import load  # noqa: E402
from torch_weights import arrays, randomise  # noqa: E402

from unibiomed_jax.conversion.oracles.language import torch_language  # noqa: E402

CONFIG = LanguageConfig(
    vocab_size=67, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=72, vocab_multiple=16
)
RANK, ALPHA = 4, 8.0


class Holder(nnx.Module):
    """Gives the decoder the path it has in the whole model."""

    def __init__(self):
        self.language_model = Qwen2(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def adapted():
    """A torch decoder, and ours with the same weights and random adapters: (torch, structure, parameters)."""
    torch_model = randomise(torch_language(CONFIG), 0)
    model = Holder()
    load(model.language_model, qwen2_leaves(arrays(torch_model.state_dict()), CONFIG, padding=0.0))
    lora.attach(model, lora.DECODER_LAYERS, rank=RANK, alpha=ALPHA, dropout=0.05, rngs=nnx.Rngs(params=1))
    graphdef, parameters = split(model)
    for path, value in parameters.items():
        if path.endswith(".lora.b"):
            key = jax.random.key(sum(map(ord, path)))
            parameters[path] = jax.random.normal(key, value.shape) * 0.2
    return torch_model, graphdef, parameters


def logits(graphdef, parameters, ids):
    decoder = merge(graphdef, parameters).language_model
    return decoder.logits(decoder(decoder.embed(jnp.asarray(ids))))


def test_the_saved_folder_gives_the_same_logits_in_peft(adapted, tmp_path):
    torch_model, graphdef, parameters = adapted
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9))
    with torch.no_grad():
        plain = torch_model(torch.tensor(ids)).logits
    save_peft_adapter(tmp_path, parameters, rank=RANK, alpha=ALPHA, dropout=0.05)
    peft_model = peft.PeftModel.from_pretrained(torch_model, tmp_path)
    try:
        with torch.no_grad():
            expected = peft_model(torch.tensor(ids)).logits
        assert_close(logits(graphdef, parameters, ids), expected, 1e-5)
        assert np.abs(expected - plain).max() > 0.1
    finally:
        peft_model.unload()


def test_merging_equals_peft_and_leaves_the_logits(adapted, tmp_path):
    torch_model, graphdef, parameters = adapted
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 9))
    merged = merge_adapters(parameters, ALPHA / RANK)
    plain_graphdef, plain = split(Holder())
    assert set(merged) == set(plain)
    assert_close(logits(plain_graphdef, merged, ids), logits(graphdef, parameters, ids), 1e-5)

    save_peft_adapter(tmp_path, parameters, rank=RANK, alpha=ALPHA, dropout=0.05)
    state = {name: value.clone() for name, value in torch_model.state_dict().items()}
    twin = transformers.Qwen2ForCausalLM(torch_model.config)
    twin.load_state_dict(state)
    expected = peft.PeftModel.from_pretrained(twin, tmp_path).merge_and_unload()
    expected = qwen2_leaves(arrays(expected.state_dict()), CONFIG, padding=0.0)
    for path, value in expected.items():
        assert_close(merged[f"language_model.{path}"], value, 1e-6, path)
