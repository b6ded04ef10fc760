"""Tables of parameters: taken apart and put together, chosen, counted, stored, merged."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from small import MODEL

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.config.precision import BFLOAT16, FAST, FLOAT32
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.parameters import (
    abstract_params,
    count,
    flatten,
    merge,
    merge_adapters,
    partition,
    split,
    stored_for,
    unflatten,
)
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import FreezeConfig

CONFIG = LanguageConfig(
    vocab_size=30, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=24, vocab_multiple=8
)


class Holder(nnx.Module):
    def __init__(self):
        self.language_model = Qwen2(CONFIG, rngs=nnx.Rngs(0))


def adapted(targets=lora.DECODER_LAYERS, dropout=0.0):
    model = Holder()
    lora.attach(model, targets, rank=2, alpha=4, dropout=dropout, rngs=nnx.Rngs(params=1))
    return model


def test_paths_and_nested_dicts_are_the_same_thing():
    tree = {"a": {0: {"b": 1}, 10: {"b": 2}}, "c": 3}
    assert flatten(tree) == {"a.0.b": 1, "a.10.b": 2, "c": 3}
    assert unflatten(flatten(tree)) == tree


@pytest.mark.slow
def test_split_and_merge_give_the_model_back():
    model = adapted()
    graphdef, parameters = split(model)
    assert parameters["language_model.layers.self_attn.q_proj.lora.a"].shape == (3, 16, 2)
    first = {path: value for path, value in parameters.items() if "lora" in path}
    second = {path: value for path, value in parameters.items() if "lora" not in path}
    again = merge(graphdef, first, second)
    embeds = jnp.ones((1, 5, 16))
    np.testing.assert_array_equal(again.language_model(embeds), model.language_model(embeds))


def test_adapters_differ_between_layers_and_start_without_effect():
    plain, model = Holder(), adapted()
    _, parameters = split(model)
    a = parameters["language_model.layers.mlp.down_proj.lora.a"]
    assert not jnp.array_equal(a[0], a[1])
    embeds = jnp.ones((1, 5, 16))
    np.testing.assert_array_equal(model.language_model(embeds), plain.language_model(embeds))


@pytest.mark.slow
def test_dropout_acts_only_with_a_key():
    model = adapted(dropout=0.5)
    for layer in lora.linear_layers(model).values():
        if layer.lora is not None:
            layer.lora.b = nnx.Param(jnp.ones_like(layer.lora.b[...]))
    embeds = jnp.linspace(-1, 1, 80).reshape(1, 5, 16)

    def run(seed):
        key = None if seed is None else nnx.Rngs(seed).params()
        return model.language_model(embeds, lora_dropout_key=key)

    assert jnp.array_equal(run(None), run(None)) and jnp.array_equal(run(3), run(3))
    assert not jnp.array_equal(run(3), run(4)) and not jnp.array_equal(run(None), run(3))


def test_any_named_layer_can_be_adapted():
    _, parameters = split(adapted(targets=("*.o_proj", "language_model.lm_head")))
    names = sorted(path for path in parameters if path.endswith(".lora.a"))
    assert names == ["language_model.layers.self_attn.o_proj.lora.a", "language_model.lm_head.lora.a"]
    assert parameters["language_model.lm_head.lora.a"].shape == (16, 2)


def test_a_target_that_fits_nothing_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"q_prj.*q_proj"):
        adapted(targets=("language_model.layers.self_attn.q_prj",))


def test_partition_follows_patterns_and_frozen_wins():
    _, parameters = split(adapted())
    trainable, frozen = partition(parameters, ["*.lora.*", "*embed_tokens"], ["*.mlp.*"])
    assert {path.split(".")[-3] for path in trainable if "lora" in path} == {
        f"{name}_proj" for name in "qkvo"
    }
    assert "language_model.embed_tokens" in trainable
    assert set(trainable) | set(frozen) == set(parameters) and not set(trainable) & set(frozen)


@pytest.mark.parametrize("trainable, frozen", [(["*.loraa.*"], []), (["*"], ["nothing.*"]), (["*"], ["*"])])
def test_a_partition_that_cannot_be_meant_is_refused(trainable, frozen):
    _, parameters = split(adapted())
    with pytest.raises(InputError):
        partition(parameters, trainable, frozen)


def test_by_default_adapters_and_a_head_of_its_own_may_be_absent():
    names = (*FreezeConfig().trainable, *FreezeConfig().frozen)
    table = {name.replace("*", "all"): jnp.zeros(1) for name in names}
    whole, _ = partition(table, FreezeConfig().trainable, FreezeConfig().frozen)
    absent = {"all.lora.all", "language_model.lm_head.kernel"}
    tied, _ = partition(
        {path: value for path, value in table.items() if path not in absent},
        FreezeConfig().trainable,
        FreezeConfig().frozen,
    )
    assert set(whole) - set(tied) == absent
    # Alone, such a head is asked for in vain.
    with pytest.raises(InputError, match="'language_model.lm_head.kernel' in trainable matches no parameter"):
        partition({"mlp1.all": 0}, ["mlp1.*", "language_model.lm_head.kernel"], [])
    with pytest.raises(InputError, match=r"No parameter would train.*--lora\.rank"):
        partition({"mlp1.all": 0}, ["*.lora.*"], [])


def test_rows_that_only_pad_the_vocabulary_are_not_counted():
    table = {
        "language_model.embed_tokens": np.zeros((32, 5)),
        "language_model.lm_head.kernel": np.zeros((7, 32)),
        "mlp1.norm.scale": np.zeros(9),
    }
    assert count(table) == 32 * 5 + 7 * 32 + 9
    assert count(table, padding_rows=2) == 30 * 5 + 7 * 30 + 9


def test_adapters_are_merged_in_float32_and_rounded_once():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 6, 4)).astype(ml_dtypes.bfloat16)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 6, 2), (3, 2, 4)))
    table = {"x.kernel": kernel, "x.lora.a": a, "x.lora.b": b, "y.kernel": kernel}
    expected = (kernel.astype(np.float64) + 2.5 * np.einsum("lir,lro->lio", a, b)).astype(kernel.dtype)
    for convert in (np.asarray, jnp.asarray):
        merged = merge_adapters({path: convert(value) for path, value in table.items()}, 2.5)
        assert merged.keys() == {"x.kernel", "y.kernel"}
        assert merged["x.kernel"].dtype == kernel.dtype
        np.testing.assert_array_equal(np.asarray(merged["x.kernel"]), expected)
        np.testing.assert_array_equal(np.asarray(merged["y.kernel"]), kernel)


# Paths of matrices, and whether they are stored in bfloat16 under FAST's policy and under BFLOAT16.
MATRICES = {
    "vision_model.layers.mlp.fc1.kernel": (True, True),
    "mlp1.linear1.kernel": (True, True),
    "language_model.embed_tokens": (False, True),
    "language_model.layers.mlp.up_proj.kernel": (False, True),
    "text_hidden_fcs.linear1.kernel": (False, False),
    # The first stage of the trunk, the pyramid, and what reads its fine maps decide where a border runs.
    "sam2.image_encoder.trunk.runs.0.mlp.fc1.kernel": (False, True),
    "sam2.image_encoder.trunk.runs.3.mlp.fc1.kernel": (True, True),
    "sam2.image_encoder.trunk.patch_embed.kernel": (False, True),
    "sam2.image_encoder.neck.0.kernel": (False, True),
    "sam2.sam_mask_decoder.conv_s0.kernel": (False, True),
    "sam2.sam_mask_decoder.upscale_conv1.kernel": (False, True),
    "sam2.memory_encoder.out_proj.kernel": (False, True),
}


def test_matrices_are_stored_as_they_are_multiplied_and_vectors_in_float32():
    def stored(precision):
        shapes = jax.eval_shape(lambda table: stored_for(table, MODEL, precision), abstract_params(MODEL))
        return {path: leaf.dtype == jnp.bfloat16 for path, leaf in shapes.items()}

    plain, fast, half = map(stored, (FLOAT32, FAST, BFLOAT16))
    assert not any(plain.values())
    assert {path: (fast[path], half[path]) for path in MATRICES} == MATRICES
    matrix = ("kernel", "embed_tokens")
    assert not any(found for path, found in half.items() if path.rpartition(".")[2] not in matrix)


def test_a_table_that_is_only_looked_up_stays_as_narrow_as_it_came():
    def stored(model, came):
        table = {"language_model.embed_tokens": jnp.ones((4, 2), came)}
        return stored_for(table, model, FLOAT32)["language_model.embed_tokens"].dtype

    tied = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, tie_word_embeddings=True))
    assert stored(MODEL, jnp.bfloat16) == jnp.bfloat16 and stored(MODEL, jnp.float32) == jnp.float32
    assert stored(tied, jnp.bfloat16) == jnp.float32
