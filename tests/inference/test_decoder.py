"""What the decoder promises beside being equal to torch's: see tests/parity/test_qwen2.py for that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.config.model import LanguageConfig
from unibiomed_jax.models.layers import Linear, Lora, stack_layers, unstack_layers
from unibiomed_jax.models.qwen2 import Qwen2

pytestmark = pytest.mark.slow

CONFIG = LanguageConfig(
    vocab_size=20, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=16, vocab_multiple=16
)
LAYOUTS = {"stack": lambda layers: layers, "list": unstack_layers}


def decoder(layout="stack"):
    model = Qwen2(CONFIG, rngs=nnx.Rngs(0))
    model.layers = LAYOUTS[layout](model.layers)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_updates_the_cache_in_place(layout, batch):
    model = decoder(layout)
    graphdef, state = nnx.split(model)
    cache = model.init_cache(batch, 2048)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    def decode(state, tokens, lengths, cache):
        model = nnx.merge(graphdef, state)

        def step(t, carry):
            tokens, cache = carry
            hidden, cache = model.decode_step(model.embed(tokens[:, None]), lengths + t, cache)
            return jnp.argmax(model.logits(hidden), -1).astype(tokens.dtype), cache

        return jax.lax.fori_loop(0, 100, step, (tokens, cache))

    row = jnp.zeros(batch, jnp.int32)
    compiled = jax.jit(decode, donate_argnames="cache").lower(state, row, row, cache).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size, "the cache that comes in is not the one that goes out"
    # Keys and values of one layer may be staged for the products, no more.
    assert memory.temp_size_in_bytes < 1.5 * size / CONFIG.num_layers


def adapted_decoder(layout, dropout):
    """A decoder whose projections all have adapters that do something."""
    model = decoder()
    block = model.layers
    for module in (block.self_attn, block.mlp):
        for layer in list(vars(module).values()):
            if isinstance(layer, Linear):
                _, features_in, features_out = layer.kernel[...].shape

                def make(rngs, features_in=features_in, features_out=features_out):
                    lora = Lora(features_in, features_out, 2, 2.0, dropout, rngs)
                    lora.b[...] = jax.random.normal(rngs.params(), lora.b[...].shape)
                    return lora

                layer.lora = stack_layers(make, CONFIG.num_layers, nnx.Rngs(1))
    model.layers = LAYOUTS[layout](model.layers)
    return model


def hidden(model, key, remat="none"):
    """The decoder's answer to fixed random embeddings."""
    embeds = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, key: nnx.merge(graphdef, state)(embeds, lora_dropout_key=key, remat=remat))
    return np.asarray(run(state, key))


def test_adapter_dropout_follows_its_key():
    key, other = jax.random.split(jax.random.key(0))
    model = adapted_decoder("stack", dropout=0.3)
    plain, dropped = hidden(model, None), hidden(model, key)
    assert not np.allclose(dropped, plain, atol=1e-3)
    assert not np.allclose(dropped, hidden(model, other), atol=1e-3)
    # Rematerialised or unrolled, the same elements are dropped.
    np.testing.assert_allclose(hidden(model, key, remat="full"), dropped, atol=1e-5)
    np.testing.assert_allclose(hidden(adapted_decoder("list", dropout=0.3), key), dropped, atol=1e-5)
    np.testing.assert_allclose(hidden(adapted_decoder("stack", dropout=0.0), key), plain, atol=1e-6)


def test_every_projection_of_every_layer_drops_its_own_elements(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Lora, "__call__", lambda self, x, key: seen.append(tuple(jax.random.key_data(key))) or 0.0
    )
    model = adapted_decoder("list", dropout=0.3)
    model(np.zeros((1, 2, 32), np.float32), lora_dropout_key=jax.random.key(0))
    assert len(seen) == len(set(map(str, seen))) == 7 * CONFIG.num_layers
