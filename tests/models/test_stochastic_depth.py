"""The drop rate of the vision tower's configuration, from the model's entrance on."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from micro_checkpoint import SMALL

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.models.unibiomed import UniBiomedModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encode():
    """Encodes eight equal tiles, with the same weights whatever the rate; `seed` is that of the dropping."""
    rng = np.random.default_rng(0)
    tiles = np.broadcast_to(rng.normal(size=(28, 28, 3)), (8, 28, 28, 3))
    model = nnx.eval_shape(lambda: UniBiomedModel(SMALL, FLOAT32, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(model)
    weights = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)

    def encode(config: ModelConfig, seed: int | None) -> np.ndarray:
        def run(weights, key):
            model = nnx.merge(graphdef, weights)
            model.vision_model.config = config.vision
            return model.encode_tiles(tiles, drop_path_key=key)

        return np.asarray(jax.jit(run)(weights, None if seed is None else jax.random.key(seed)))

    return encode


def test_stochastic_depth_needs_a_rate_and_a_key(encode):
    dropping = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, drop_path_rate=0.5))
    plain = encode(SMALL, seed=1)
    np.testing.assert_array_equal(plain, encode(dropping, seed=None))
    assert len(np.unique(plain.round(3), axis=0)) == 1
    # Equal tiles lose different branches; there are four choices in the one layer that drops.
    dropped = encode(dropping, seed=1)
    assert 2 <= len(np.unique(dropped.round(3), axis=0)) <= 4
    assert not np.allclose(dropped, encode(dropping, seed=2), atol=0.1)
