import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.parameters import merge, partition, split
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
