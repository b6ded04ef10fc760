"""Programs for different targets: what they are compiled for decides how they look, not who traces them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from unibiomed_jax.config.model import HieraConfig
from unibiomed_jax.models.attention import row_major, xla_attention
from unibiomed_jax.models.hiera import CELLS_IN_CACHE, Hiera, bands
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.sharding.strategies import DATA_PARALLEL, MESH_AXES
from unibiomed_jax.sharding.target import Target, target


def layout_of(platform: str | None, devices: int) -> Layout:
    mesh = AbstractMesh(
        (devices, 1, 1, 1),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * 4,  # as of a mesh of real devices
        abstract_device=platform and AbstractDevice(platform, None, platform),
    )
    return Layout(mesh, DATA_PARALLEL, {})


CPU, EIGHT_CPUS, GPU, EIGHT_GPUS, UNNAMED = (
    layout_of(*place) for place in (("cpu", 1), ("cpu", 8), ("gpu", 1), ("gpu", 8), (None, 8))
)
NAMES = ["cpu", "eight cpus", "gpu", "eight gpus", "unnamed"]


@pytest.fixture
def another_process(monkeypatch):
    """The process that traces has eight GPUs, as far as anybody asks."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda *args: 8)
    monkeypatch.setattr(jax, "local_device_count", lambda *args: 8)


def trace(layout: Layout | None, function, *arguments):
    """The program of a layout; of none in particular."""
    return (jax.jit(function) if layout is None else layout.jit(function)).trace(*arguments)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (CPU, ("cpu", 1)),
        (EIGHT_CPUS, ("cpu", 8)),
        (GPU, ("gpu", 1)),
        (EIGHT_GPUS, ("gpu", 8)),
        (UNNAMED, (None, 8)),
        (Layout.over(jax.devices()[:1]), (jax.devices()[0].platform, 1)),
    ],
    ids=[*NAMES, "this device"],
)
def test_the_target_is_that_of_the_layout_inside_and_nobodys_outside(another_process, layout, expected):
    nobody = Target(None, 1)
    assert target() == nobody
    seen = []

    def program(x):
        seen.append(target())
        return x

    trace(layout, program, 0.0)
    trace(None, program, 0.0)
    assert seen == [expected, nobody]
    with layout.inside():
        assert target() == expected
    with pytest.raises(RuntimeError), layout.inside():
        raise RuntimeError
    assert target() == nobody


def test_a_compiled_function_keeps_its_target():
    """Whatever is in force where it is called."""
    seen = []
    program = CPU.jit(lambda x: seen.append(target()) or x)
    with GPU.inside():
        program.trace(1.0)
        assert target() == ("gpu", 1)
    assert seen == [("cpu", 1)]


# ------------------------------------------------------------------------------------------------------------
# bands of Hiera's windows


@pytest.mark.parametrize(
    ("layout", "count"), [(CPU, 2), (EIGHT_CPUS, 1), (GPU, 1), (EIGHT_GPUS, 1), (UNNAMED, 1), (None, 1)]
)
def test_one_cpu_takes_the_windows_in_bands(another_process, layout, count):
    found = []
    trace(layout, lambda x: found.append(bands(64, 8)) or x, 0.0)
    assert found == [count] and 2 * CELLS_IN_CACHE == 64 * 8**2


@given(windows=st.integers(1, 5000), window=st.sampled_from([1, 4, 7, 8, 14, 16, 64]))
def test_bands_are_equal_and_no_more_than_the_cache_asks_for(windows, window):
    with CPU.inside():
        count = bands(windows, window)
    most = max(1, windows * window**2 // CELLS_IN_CACHE)
    assert count == max(n for n in range(1, most + 1) if windows % n == 0)
    with EIGHT_CPUS.inside():
        assert bands(windows, window) == 1


def test_the_trunk_of_one_cpu_alone_loops_over_bands(another_process):
    config = HieraConfig(embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), global_attention_blocks=())
    graphdef, parameters = nnx.split(nnx.eval_shape(lambda: Hiera(config, rngs=nnx.Rngs(0))))
    pixels = jax.ShapeDtypeStruct((8, 128, 128, 3), jnp.float32)

    def program(layout) -> str:
        call = trace(layout, lambda params, x: nnx.merge(graphdef, params)(x), parameters, pixels)
        return str(call.jaxpr)

    alone, shared = program(CPU), [program(layout) for layout in (EIGHT_CPUS, GPU, EIGHT_GPUS, UNNAMED, None)]
    # The first stage has 8 maps of 32x32 cells. Every stage is one block long, and a loop over it alone is
    # `length=1`.
    assert 8 * 32**2 == 4 * CELLS_IN_CACHE
    assert "length=4" in alone and not any("length=4" in text for text in shared)
    (loops,) = {text.count("scan[") for text in shared}
    assert alone.count("scan[") > loops


# ------------------------------------------------------------------------------------------------------------
# the layout of attention's operands in memory

X = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)


def constraints(layout: Layout | None, platform: str, function, *arguments) -> int:
    """How often a lowered program asks for a layout in memory."""
    lowered = trace(layout, function, *arguments).lower(lowering_platforms=(platform,))
    return lowered.as_text().count("@LayoutConstraint")


@pytest.mark.parametrize("layout", [EIGHT_CPUS, EIGHT_GPUS, UNNAMED])
def test_row_major_is_nothing_where_devices_share_a_program(layout):
    program = trace(layout, row_major, X).jaxpr
    assert not program.eqns and program.jaxpr.outvars == program.jaxpr.invars


@pytest.mark.parametrize("layout", [CPU, GPU, None])
def test_row_major_is_a_constraint_of_a_cpu_alone(another_process, layout):
    found = {platform: constraints(layout, platform, row_major, X) for platform in ("cpu", "cuda", "tpu")}
    assert found == {"cpu": 1, "cuda": 0, "tpu": 0}


@pytest.mark.parametrize("layout", [CPU, EIGHT_CPUS, GPU, EIGHT_GPUS, UNNAMED], ids=NAMES)
def test_attention_asks_for_a_layout_on_one_cpu_alone(another_process, layout):
    q, kv = (jax.ShapeDtypeStruct((2, 5, heads, 8), jnp.float32) for heads in (4, 2))
    found = {
        platform: constraints(layout, platform, xla_attention, q, kv, kv) for platform in ("cpu", "cuda")
    }
    with layout.inside():
        shared = target().devices > 1
    # Queries, keys, values and what comes out.
    assert found == {"cpu": 0 if shared else 4, "cuda": 0}
