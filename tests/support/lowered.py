"""The train step as it is lowered for a pod of TPUs that nobody has."""

import hashlib

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from small import IDS, MODEL, STEP, random_batch

from unibiomed_jax.sharding.axes import axis_units
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import FSDP_TENSOR, MESH_AXES
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.start import abstract_state
from unibiomed_jax.training.step import TrainStep


def digest() -> str:
    """sha256 of the program's text."""
    tpu = AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = AbstractMesh((1, 8, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=tpu)
    layout = Layout(mesh, FSDP_TENSOR, axis_units(MODEL))
    graphdef, shapes = structure(STEP)
    abstract = abstract_state(STEP, shapes, layout)
    batch = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout.batch)
        for name, value in random_batch(0, size=8).items()
    }
    step = TrainStep(graphdef, STEP, IDS, layout).whole
    traced = step.trace(abstract["train"], abstract["frozen"], batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return hashlib.sha256(text.encode()).hexdigest()
