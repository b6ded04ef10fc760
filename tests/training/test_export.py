"""What a run leaves behind: adapters of every layer in the model, those of the decoder for peft."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from places import ROOT
from small import IDS, STEP, random_batch

from unibiomed_jax import checkpoint
from unibiomed_jax.parameters import flatten, merge, merge_adapters, partition, split
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import FreezeConfig
from unibiomed_jax.training.export import export_model
from unibiomed_jax.training.forward import answer_batch
from unibiomed_jax.training.initialise import build_model, random_parameters
from unibiomed_jax.training.step import init_state

pytestmark = pytest.mark.slow

TOKENIZER = ROOT / "configs" / "unibiomed_tiny" / "tokenizer"
OUTSIDE = ("mlp1.*", "text_hidden_fcs.*", "vision_model.*", "sam2.*")


def adapted(targets):
    """Configuration, and parameters with adapters that do something, of the small model."""
    config = dataclasses.replace(
        STEP,
        lora=dataclasses.replace(STEP.lora, targets=targets, dropout=0.0),
        freeze=FreezeConfig(trainable=("*.lora.*",), frozen=(), frozen_dtype="float32"),
        export_dtype="float32",
    )
    parameters = random_parameters(config)
    for number, (path, value) in enumerate(sorted(parameters.items())):
        if path.endswith(".lora.b"):
            parameters[path] = 0.1 * jax.random.normal(jax.random.key(number), value.shape)
    return config, parameters


def test_merged_adapters_of_any_linear_layer_leave_the_answers():
    config, parameters = adapted((*lora.DECODER_LAYERS, *OUTSIDE))
    scale = config.lora.alpha / config.lora.rank
    plain = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))
    merged = merge_adapters(parameters, scale)
    without = {path: value for path, value in parameters.items() if ".lora." not in path}
    assert merged.keys() == without.keys()
    batch = random_batch(0)

    def answers(config, table):
        graphdef, _ = split(build_model(config))
        found = jax.jit(lambda: answer_batch(merge(graphdef, table), batch, IDS, token_chunk=8))()
        return np.asarray(found.answers.cross_entropy), np.asarray(found.masks)

    for apart, together, bare in zip(
        answers(config, parameters), answers(plain, merged), answers(plain, without), strict=True
    ):
        assert np.abs(apart - bare).max() > 1e-3 * np.abs(apart).max()
        np.testing.assert_allclose(apart, together, atol=2e-5 * np.abs(apart).max())


@pytest.mark.parametrize("targets, for_peft", [(lora.DECODER_LAYERS, True), (("*.q_proj", "mlp1.*"), False)])
def test_peft_gets_a_folder_only_if_it_knows_all_adapters(tmp_path, caplog, targets, for_peft):
    config, parameters = adapted(targets)
    trainable, frozen = partition(parameters, config.freeze.trainable, config.freeze.frozen)
    with caplog.at_level(logging.WARNING):
        export_model(tmp_path, config, init_state(trainable, config), frozen, TOKENIZER)
    assert (tmp_path / "adapter").is_dir() == for_peft
    assert ("peft knows the decoder's adapters alone and mlp1." in caplog.text) != for_peft
    expected = merge_adapters(parameters, config.lora.alpha / config.lora.rank)
    found = flatten(checkpoint.load(tmp_path / "model").params)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=path)
