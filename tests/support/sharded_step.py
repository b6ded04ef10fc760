"""Run in a process with eight CPU devices by test_layouts.py; prints its findings as one line of JSON."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small import IDS, MODEL, STEP, build, random_batch

from unibiomed_jax.models.hiera import Hiera
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import DATA_PARALLEL, FSDP, STRATEGIES
from unibiomed_jax.sharding.target import target
from unibiomed_jax.training.config import CheckpointConfig
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.snapshot import Checkpointer
from unibiomed_jax.training.start import Start, abstract_state, summary
from unibiomed_jax.training.step import TrainStep

# Without clipping, which would hide a gradient of the right direction and the wrong size.
CONFIG = dataclasses.replace(
    STEP,
    lora=dataclasses.replace(STEP.lora, dropout=0.0),
    optim=dataclasses.replace(STEP.optim, clip=1e9),
)


def run(graphdef, state, frozen, layout):
    """State and metrics after one update."""
    step = TrainStep(graphdef, CONFIG, IDS, layout)
    batch = layout.place_batch(random_batch(5, size=8))
    return step(layout.place(state), layout.place(frozen), [batch])


def first_gradient(state):
    """The gradient of the first update, from Adam's first moment."""
    return [np.asarray(leaf) / 0.1 for leaf in jax.tree.leaves(state.moments[1].mu)]


def bytes_on_first_device(state):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


def trunk_collectives():
    """How often the devices talk while each of them encodes its own two images."""
    layout = Layout.over()
    graphdef, parameters = nnx.split(Hiera(MODEL.sam2.hiera, rngs=nnx.Rngs(0)))
    pixels = jax.ShapeDtypeStruct((16, 128, 128, 3), jnp.float32, sharding=layout.batch)
    program = layout.jit(lambda parameters, pixels: nnx.merge(graphdef, parameters)(pixels))
    text = program.lower(parameters, pixels).compile().as_text()
    return len(re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text))


def targets():
    """What programs for one device, for eight and for none in particular think they are compiled for."""
    seen = {}
    for name, jit in (
        ("none", jax.jit),
        ("one", Layout.over(jax.devices()[:1]).jit),
        ("eight", Layout.over().jit),
    ):
        jit(lambda x, name=name: seen.setdefault(name, target()) and x)(0)
    return seen


def said(strategy):
    """What a run says before it starts."""
    config = dataclasses.replace(CONFIG, strategy=strategy)
    layout = Layout.over(strategy=STRATEGIES[strategy], model=MODEL)
    graphdef, shapes = structure(config)
    start = Start(config, layout, None, None, IDS, graphdef, abstract_state(config, shapes, layout))
    return summary(start, SimpleNamespace(mixture=SimpleNamespace(records=range(12)), steps_per_epoch=3))


def main(folder):
    assert len(jax.devices()) == 8
    graphdef, state, frozen = build(CONFIG)
    state, frozen = jax.device_get((state, frozen))
    one, expected = run(graphdef, state, frozen, Layout.over(jax.devices()[:1], DATA_PARALLEL, MODEL))
    found = {}
    for name, strategy in STRATEGIES.items():
        eight, metrics = run(graphdef, state, frozen, Layout.over(None, strategy, MODEL))
        losses = [
            abs(float(metrics[key]) - float(expected[key])) for key in metrics if key.startswith("loss")
        ]
        pairs = zip(first_gradient(eight), first_gradient(one), strict=True)
        found[name] = {
            "loss": max(losses),
            "gradient": max(float(np.abs(a - b).max()) for a, b in pairs),
            "norm": abs(float(metrics["gradient_norm"]) - float(expected["gradient_norm"])),
            "bytes": bytes_on_first_device(eight),
            "said": said(name),
        }

    found["trunk_collectives"] = trunk_collectives()
    found["targets"] = targets()

    checkpointer = Checkpointer(folder, CheckpointConfig())
    checkpointer.save(1, eight, position={}, config={})
    checkpointer.wait()
    found["restored"] = {}
    for number in (1, 4, 8):
        layout = Layout.over(jax.devices()[:number], FSDP, MODEL)
        restored = checkpointer.restore(layout.abstract(eight)).state
        found["restored"][number] = all(
            np.array_equal(a, b) and a.sharding == place
            for a, b, place in zip(
                jax.tree.leaves(restored),
                jax.tree.leaves(eight),
                jax.tree.leaves(layout.tree(eight)),
                strict=True,
            )
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
