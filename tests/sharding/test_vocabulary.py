"""What the vocabulary's two tables make chips talk about, compiled for TPUs that nobody has."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import collectives

from unibiomed_jax.config.model import LanguageConfig, ModelConfig
from unibiomed_jax.models.qwen2 import Qwen2
from unibiomed_jax.parameters import EMBEDDING, HEAD, flatten, unflatten
from unibiomed_jax.sharding.constraints import constrain, gather_unstacked
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import STRATEGIES
from unibiomed_jax.training.losses import token_cross_entropy

# Three chunks of tokens, and no width that is a multiple of the batch of eleven samples a chip.
TOKENS, CHUNK, SAMPLES = 48, 16, 11
CONFIG = LanguageConfig(
    vocab_size=1500,
    hidden_size=128,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=256,
    vocab_multiple=512,
)
ROWS = CONFIG.padded_vocab_size


@pytest.fixture(scope="module")
def chips():
    """Eight of a TPU v5e, for a compiler that looks for none on this machine."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, value)
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def moved(chips, strategy, **mesh):
    """Collectives of the gradients of both tables, for the loss of answers to their embedded tokens."""
    layout = Layout.over(chips, STRATEGIES[strategy], ModelConfig(language=CONFIG), mesh)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Qwen2(CONFIG, rngs=nnx.Rngs(0))))
    table = flatten({"language_model": nnx.to_pure_dict(state)})
    trained = {path: table.pop(path) for path in (EMBEDDING, HEAD)}

    def gradients(trained, frozen, ids):
        def loss(trained):
            parameters = unflatten(gather_unstacked(trained | frozen))
            model = nnx.merge(graphdef, parameters["language_model"])
            embeds = constrain(model.embed(ids).astype(jnp.bfloat16), "batch", "language.tokens", None)
            hidden, vocabulary = model(embeds, remat="full"), CONFIG.vocab_size
            return token_cross_entropy(hidden, model.head(), ids, vocab_size=vocabulary, chunk=CHUNK)[0].sum()

        return layout.pin(jax.grad(loss)(trained))

    batch = SAMPLES * layout.batch_shares
    ids = jax.ShapeDtypeStruct((batch, TOKENS), np.int32, sharding=layout.batch)
    traced = layout.jit(gradients).trace(layout.abstract(trained), layout.abstract(table), ids)
    return batch, collectives(traced.lower(lowering_platforms=("tpu",)).compile().as_text())


@pytest.mark.scale
def test_gradients_of_the_vocabulary_are_summed_once_and_no_batch_is_gathered(chips):
    batch, found = moved(chips, "fsdp", fsdp=8)
    shapes = [shape for collective in found for shape in collective.shapes]
    assert not [shape for shape in shapes if any(size and size % batch == 0 for size in shape)]
    tables = [
        collective
        for collective in found
        if collective.kind in ("all-reduce", "reduce-scatter")
        and any(math.prod(shape) * 8 >= ROWS * CONFIG.hidden_size for shape in collective.shapes)
    ]
    assert sum(len(collective.shapes) for collective in tables) == 2
    assert all(collective.times == 1 for collective in tables)
