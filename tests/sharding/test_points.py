"""What the points of the mask losses make chips talk about, compiled for TPUs that nobody has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from programs import collectives
from small import MODEL

from unibiomed_jax.planning.topologies import find_topology
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import STRATEGIES
from unibiomed_jax.training.config import LossConfig
from unibiomed_jax.training.forward import Prediction, loss_sums
from unibiomed_jax.training.losses import TokenLoss

pytestmark = pytest.mark.scale

# Samples of a share, objects, frames and the side of masks.
SAMPLES, OBJECTS, FRAMES, SIDE = 3, 2, 2, 16


@pytest.mark.parametrize(
    ("strategy", "mesh"), [("fsdp", {"fsdp": 8}), ("sequence", {"fsdp": 4, "sequence": 2})]
)
def test_a_device_chooses_and_reads_the_points_of_its_own_masks(strategy, mesh):
    """No sort and no gather needs the masks of another device: what is exchanged is the sum of the losses."""
    pytest.importorskip("libtpu")
    layout = Layout.over(find_topology("v5e:2x4").devices(), STRATEGIES[strategy], MODEL, mesh)
    config = LossConfig(num_points=128)
    batch = SAMPLES * layout.batch_shares

    def losses(logits, masks, valid, key):
        answers = TokenLoss(jnp.zeros(batch), jnp.zeros(batch, jnp.int32))

        def total(logits):
            prediction = Prediction(answers, logits, valid)
            sums = loss_sums(prediction, {"masks": masks}, config, jax.random.wrap_key_data(key))
            return sums.masks + sums.dice

        return jax.value_and_grad(total)(logits)

    def array(shape, dtype, place=layout.batch):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    masks = (batch, OBJECTS, FRAMES)
    traced = layout.jit(losses).trace(
        array((*masks, SIDE, SIDE), np.float32),
        array((*masks, SIDE, SIDE), np.uint8),
        array(masks, np.bool_),
        array((2,), np.uint32, NamedSharding(layout.mesh, PartitionSpec())),
    )
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert " sort(" in text
    assert {(one.kind, one.shapes) for one in collectives(text)} == {("all-reduce", ((),))}
