"""Run in a process with eight CPU devices by test_sharding.py; prints its findings as one line of JSON."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small import IDS, MODEL, STEP, build, random_batch

from unibiomed_jax.models.hiera import Hiera
from unibiomed_jax.sharding import layout as sharding
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training.config import CheckpointConfig
from unibiomed_jax.training.snapshot import Checkpointer
from unibiomed_jax.training.step import TrainStep, place, place_batch

# Without clipping, which would hide a gradient of the right direction and the wrong size.
CONFIG = dataclasses.replace(
    STEP,
    lora=dataclasses.replace(STEP.lora, dropout=0.0),
    optim=dataclasses.replace(STEP.optim, clip=1e9),
)


def run(graphdef, state, frozen, strategy, devices):
    """State and metrics after one update."""
    mesh = Layout.over(devices)
    state, frozen = place((state, frozen), strategy, mesh)
    step = TrainStep(graphdef, CONFIG, IDS, mesh, strategy)
    return step(state, frozen, [place_batch(random_batch(5, size=8), strategy, mesh)])


def first_gradient(state):
    """The gradient of the first update, from Adam's first moment."""
    return [np.asarray(leaf) / 0.1 for leaf in jax.tree.leaves(state.moments[1].mu)]


def bytes_on_first_device(state):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


def trunk_collectives():
    """How often the devices talk while each of them encodes its own two images."""
    trunk = Hiera(MODEL.sam2.hiera, rngs=nnx.Rngs(0))
    layout = sharding.batch_sharding(sharding.DATA_PARALLEL, Layout.over(jax.devices()))
    pixels = jax.ShapeDtypeStruct((16, 128, 128, 3), jnp.float32, sharding=layout)
    text = nnx.jit(lambda trunk, pixels: trunk(pixels)).lower(trunk, pixels).compile().as_text()
    return len(re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text))


def main(folder):
    assert len(jax.devices()) == 8
    graphdef, state, frozen = build(CONFIG)
    state, frozen = jax.device_get((state, frozen))
    one, expected = run(graphdef, state, frozen, sharding.DATA_PARALLEL, jax.devices()[:1])
    found = {}
    for name, strategy in sharding.STRATEGIES.items():
        eight, metrics = run(graphdef, state, frozen, strategy, jax.devices())
        losses = [
            abs(float(metrics[key]) - float(expected[key])) for key in metrics if key.startswith("loss")
        ]
        pairs = zip(first_gradient(eight), first_gradient(one), strict=True)
        found[name] = {
            "loss": max(losses),
            "gradient": max(float(np.abs(a - b).max()) for a, b in pairs),
            "norm": abs(float(metrics["gradient_norm"]) - float(expected["gradient_norm"])),
            "bytes": bytes_on_first_device(eight),
        }

    found["trunk_collectives"] = trunk_collectives()

    checkpointer = Checkpointer(folder, CheckpointConfig())
    checkpointer.save(1, eight, position={}, config={})
    checkpointer.wait()
    found["restored"] = {}
    for number in (1, 4, 8):
        layout = sharding.tree_shardings(eight, sharding.FSDP, Layout.over(jax.devices()[:number]))
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), eight, layout
        )
        restored = checkpointer.restore(abstract).state
        found["restored"][number] = all(
            np.array_equal(a, b) and a.sharding == place
            for a, b, place in zip(
                jax.tree.leaves(restored), jax.tree.leaves(eight), jax.tree.leaves(layout), strict=True
            )
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
