"""Run in a process with eight CPU devices by test_layouts.py; prints its findings as one line of JSON."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import lowered
import numpy as np
from flax import nnx
from programs import arguments, collectives
from small import IDS, MODEL, STEP, build, random_batch

from unibiomed_jax.config.model import HieraConfig
from unibiomed_jax.models.hiera import Hiera
from unibiomed_jax.models.layers import Lora
from unibiomed_jax.planning import program_text
from unibiomed_jax.planning.facts import idle_bytes
from unibiomed_jax.planning.programs import Program
from unibiomed_jax.sharding.axes import logical_axes
from unibiomed_jax.sharding.constraints import constrain
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import STRATEGIES
from unibiomed_jax.sharding.target import target
from unibiomed_jax.training.config import CheckpointConfig
from unibiomed_jax.training.footprint import device_bytes, update_program
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.snapshot import Checkpointer
from unibiomed_jax.training.start import Start, abstract_state, summary
from unibiomed_jax.training.step import TrainStep

# No width, number of tokens or of windows is a multiple of it, so that it shows where a batch went.
BATCH = 88
UPDATES = 5
MESHES = {
    "data_parallel": None,
    "zero1": None,
    "fsdp": None,
    "hsdp": {"replica": 2, "fsdp": 4},
    "tensor": {"replica": 4, "tensor": 2},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "sequence": {"fsdp": 4, "sequence": 2},
}
# Three layers: no other axis is as long, so that a stack of them shows. Without clipping, which would hide a
# gradient of the right direction and the wrong size; without momentum, Adam's first moment is the gradient.
CONFIG = dataclasses.replace(
    STEP,
    model=dataclasses.replace(
        MODEL,
        vision=dataclasses.replace(MODEL.vision, num_layers=3, drop_path_rate=0.1),
        language=dataclasses.replace(MODEL.language, num_layers=3),
        sam2=dataclasses.replace(
            MODEL.sam2,
            hiera=HieraConfig(embed_dim=8, num_heads=1, stages=(1, 1, 4, 1), global_attention_blocks=()),
        ),
    ),
    optim=dataclasses.replace(STEP.optim, clip=1e9, lr=4e-5, warmup=0.0, beta1=0.0),
)


def share_of_flops(graphdef, state, frozen):
    """Of an update of the samples that one of eight devices has, on a device of its own."""
    layout = Layout.over(jax.devices()[:1], model=MODEL)
    batch = layout.place_batch(random_batch(0, size=BATCH // 8))
    program = TrainStep(graphdef, CONFIG, IDS, layout).whole.lower(state, frozen, batch).compile()
    return program.cost_analysis()["flops"]


def layout_of(name):
    return Layout.over(None, STRATEGIES[name], MODEL, MESHES[name])


def run(graphdef, state, frozen, layout):
    """The program of an update, and losses and gradients of five updates."""
    step = TrainStep(graphdef, CONFIG, IDS, layout)
    state, frozen = layout.place(state, "optimizer"), layout.place(frozen)
    batches = [layout.place_batch(random_batch(seed, size=BATCH)) for seed in range(UPDATES)]
    program = step.whole.lower(state, frozen, batches[0]).compile()
    losses, gradients = [], []
    for batch in batches:
        state, metrics = program(state, frozen, batch)
        losses.append([float(value) for name, value in metrics.items() if name.startswith("loss")])
        gradients.append(jax.device_get(state.moments[1].mu))
    return program, state, np.array(losses), gradients


def difference(found, expected):
    """The largest relative difference of an update's gradient, as one long vector."""

    def long(tree):
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])

    pairs = [(long(a), long(b)) for a, b in zip(found, expected, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def mesh_of(name):
    return dict(layout_of(name).mesh.shape)


def held_by(graphdef, state, frozen, layout):
    """Bytes that a plan says a device reads of the arguments of an update."""
    shapes = {"train": layout.abstract(state, "optimizer"), "frozen": layout.abstract(frozen)}
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout.batch)
        for name, value in random_batch(0, size=BATCH).items()
    }
    step = TrainStep(graphdef, CONFIG, IDS, layout)
    function, arguments, held = update_program(CONFIG, step, shapes, batch, layout)
    program = Program(function, arguments, layout, held, 0.0, BATCH)
    return device_bytes(arguments) - idle_bytes(function.trace(*arguments).jaxpr, program)


def bytes_on_first_device(state):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


def needed(state, frozen, used):
    """Bytes that have to move under FSDP: weights, layers again on the way back, and gradients.

    A gradient goes back through the layers of the language model alone.
    """
    once = again = 0
    for path, value in (state.trainable | frozen).items():
        meanings = logical_axes(path, value.ndim)
        if path in used and sum(meaning != "layer" for meaning in meanings) > 1:
            once += value.nbytes
            again += value.nbytes if path.startswith("language_model.layers") else 0
    return once, again, sum(value.nbytes for value in state.trainable.values())


def said():
    """What a run under FSDP says before it starts."""
    config = dataclasses.replace(CONFIG, strategy="fsdp")
    graphdef, shapes = structure(config)
    layout = layout_of("fsdp")
    start = Start(config, layout, None, None, IDS, graphdef, abstract_state(config, shapes, layout))
    return summary(start, SimpleNamespace(mixture=SimpleNamespace(records=range(12)), steps_per_epoch=3))


def trunk_collectives():
    """How often the devices talk while each of them encodes its own two images."""
    layout = Layout.over()
    graphdef, parameters = nnx.split(Hiera(MODEL.sam2.hiera, rngs=nnx.Rngs(0)))
    pixels = jax.ShapeDtypeStruct((16, 128, 128, 3), jnp.float32, sharding=layout.batch)
    program = layout.jit(lambda parameters, pixels: nnx.merge(graphdef, parameters)(pixels))
    return len(collectives(program.lower(parameters, pixels).compile().as_text()))


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


def dropped(name):
    """What an adapter under a strategy makes of ones."""
    layout = layout_of(name)
    graphdef, lora = nnx.split(Lora(16, 16, 16, 1.0, 0.25, nnx.Rngs(0)))

    def drop(lora, x, key):
        x = constrain(x, "batch", "language.tokens", None)
        return nnx.merge(graphdef, jax.tree.map(lambda _: jnp.eye(16), lora))(x, key)

    x = jax.device_put(jnp.ones((BATCH, 12, 16)), layout.batch)
    return np.asarray(layout.jit(drop)(lora, x, jax.random.key(3)))


def main(folder):
    assert len(jax.devices()) == 8
    graphdef, state, frozen = build(CONFIG)
    state, frozen = jax.device_get((state, frozen))
    share = share_of_flops(graphdef, state, frozen)
    one = Layout.over(jax.devices()[:1], model=MODEL)
    _, _, losses, gradients = run(graphdef, state, frozen, one)
    found, states = {}, {}
    for name in STRATEGIES:
        print(name, "is compiled", file=sys.stderr)
        program, states[name], own_losses, own_gradients = run(graphdef, state, frozen, layout_of(name))
        text = program.as_text()
        memory = program.memory_analysis()
        parsed = program_text.parse(text)
        found[name] = {
            "held": [held_by(graphdef, state, frozen, layout_of(name)), memory.argument_size_in_bytes],
            "kept": [program_text.kept_for_backward(parsed), memory.temp_size_in_bytes],
            "axes": sorted(
                {axis for one in program_text.collectives(parsed, mesh_of(name)) for axis in one.axes}
            ),
            "loss": float(np.abs(own_losses / losses - 1).max()),
            "gradient": difference(own_gradients, gradients),
            "bytes": bytes_on_first_device(states[name]),
            "collectives": collectives(text),
            "needed": needed(state, frozen, arguments(text)),
            "flops": program.cost_analysis()["flops"] / share,
        }

    kept = np.asarray(jax.random.bernoulli(jax.random.key(3), 0.75, (BATCH, 12, 16))) / np.float32(0.75)
    found["dropped"] = {name: np.array_equal(dropped(name), kept) for name in STRATEGIES}
    found["batch"] = BATCH
    found["stacks"] = [
        (value.shape, path in frozen)
        for path, value in (state.trainable | frozen).items()
        if value.ndim > 2
        and "layer" in logical_axes(path, value.ndim)
        and value.shape[0] > 1
        # Four small networks that work side by side.
        and "hypernetworks" not in path
    ]
    found["trunk_collectives"] = trunk_collectives()
    found["targets"] = targets()
    found["summary"] = said()
    found["lowered"] = lowered.digest()
    found["restored"] = {}
    for name in ("data_parallel", "fsdp_tensor"):  # whole, and divided along two axes
        saved = states[name]
        checkpointer = Checkpointer(f"{folder}/{name}", CheckpointConfig())
        checkpointer.save(1, saved, position={}, config={})
        checkpointer.wait()
        for other in STRATEGIES:
            layout = layout_of(other)
            restored = checkpointer.restore(layout.abstract(saved, "optimizer")).state
            places = layout.tree(saved, "optimizer")
            found["restored"][f"{name} as {other}"] = all(
                np.array_equal(a, b) and a.sharding == place
                for a, b, place in zip(*map(jax.tree.leaves, (restored, saved, places)), strict=True)
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
