"""Facts of programs compiled for chips that are not here, and how they are kept."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from planned import needs_tpu_compiler, small_answer
from small import MODEL, STEP

from unibiomed_jax.data.pipeline import PipelineConfig
from unibiomed_jax.data.plan import Shape
from unibiomed_jax.errors import InputError
from unibiomed_jax.planning import facts, programs
from unibiomed_jax.planning.arithmetic import operations
from unibiomed_jax.planning.programs import TrainCase, build
from unibiomed_jax.training import flops

pytestmark = needs_tpu_compiler
FSDP = small_answer("encode_tiles", strategy="fsdp")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def found(kept):
    return facts.find(FSDP, kept)


def test_a_stage_for_eight_chips(found):
    compiled = found.compiled
    assert (found.chips, found.devices, found.samples) == (8, 8, 8)
    assert found.mesh == {"replica": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert compiled.refused is None and compiled.seconds > 0
    # Shares of the layers are gathered, in their loop or before it where that is one layer long.
    gathers = [one for one in compiled.collectives if one.kind == "all-gather"]
    assert gathers and all(one.axes == ("fsdp",) and one.group == 8 for one in gathers)
    width = MODEL.vision.hidden_size
    assert sum(one.bytes for one in gathers) >= 2 * (4 * width * width + 2 * width * MODEL.vision.mlp_dim)
    # What a chip reads is no less than what it was given for this program.
    assert 0 < found.idle < found.held["parameters"]
    assert compiled.traffic > 0 and compiled.peak > 0
    assert set(found.operations) == {"bfloat16"}
    assert found.attention == {"vision": "xla"}  # five tokens a tile are too few for a kernel
    assert {"code", "jax", "libtpu"} == set(found.made_by)


def test_a_second_look_compiles_nothing(found, kept, monkeypatch):
    monkeypatch.setattr(facts, "build", None)
    assert facts.look(FSDP, kept) == facts.find(FSDP, kept) == found
    assert facts.look(small_answer("prefill"), kept) is None


def test_code_that_makes_the_same_program_compiles_nothing(found, kept, monkeypatch):
    monkeypatch.setattr(facts, "made_by", lambda: {"code": "another"})
    assert facts.look(FSDP, kept) is None
    assert facts.look(FSDP, kept, of_any_code=True) == found
    monkeypatch.setattr(facts, "compile_program", None)
    again = facts.find(FSDP, kept)
    assert again.compiled == found.compiled and again.made_by == {"code": "another"}


@pytest.mark.parametrize("batch", [1_000_000, 7_000_000])
def test_what_does_not_fit_says_how_much_it_asks_for(kept, batch):
    """Two tiles of 2.3 kB a row; the compiler says it in two ways."""
    case = small_answer("encode_tiles", "v5e:1x1", batch=batch)
    refused = facts.find(case, kept).compiled.refused
    assert refused is not None
    asked, there = refused
    assert there < 16 * 2**30 < asked
    assert facts.find(case, kept).compiled.traffic == 0


def test_several_slices_and_what_crosses_them(kept):
    case = small_answer("encode_tiles", "v5e:2x2@2", strategy="hsdp")
    found = facts.find(case, kept)
    assert found.mesh["replica"] == 2 and found.mesh["fsdp"] == 4 and found.chips == 8
    assert all("replica" not in one.axes for one in found.compiled.collectives if one.kind == "all-gather")


def test_an_update_as_it_is_traced_for_four_chips():
    """What it holds is what lies on a chip; what it needs is what the formula says."""
    config = dataclasses.replace(STEP, strategy="fsdp", data=PipelineConfig(datasets=(), batch_size=8))
    program = build(TrainCase("small", config, Shape(1, 2, 2, 12), "v5e:2x2"))
    traced = program.function.trace(*program.arguments)
    assert (program.samples, program.layout.mesh.size) == (8, 4)
    assert sum(operations(traced.jaxpr).values()) > program.useful > 0
    arguments = facts.device_bytes(program.arguments)
    assert arguments == sum(facts.device_bytes(tree) for tree in program.held.values()) + 4 + 4 + 8
    # Validity of tiles and tokens, which only the meter reads, and parameters that no loss reaches.
    unread = facts.idle_bytes(traced.jaxpr, program)
    assert 0 < unread < arguments
    # Gradients are summed over several batches: what one of them does not read lies there all the same.
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=2))
    several = build(TrainCase("small", config, Shape(1, 2, 2, 12), "v5e:2x2"))
    traced = several.function.trace(*several.arguments)
    assert facts.idle_bytes(traced.jaxpr, several) >= unread + facts.device_bytes(several.held["optimiser"])


def test_a_batch_that_chips_cannot_share_is_refused():
    config = dataclasses.replace(STEP, strategy="fsdp", data=PipelineConfig(datasets=(), batch_size=12))
    with pytest.raises(InputError, match="12 samples cannot be split over 8"):
        build(TrainCase("small", config, Shape(1, 2, 2, 12), "v5e:2x4"))


def test_an_answer_is_worth_the_forward_pass_of_its_tokens():
    program = build(small_answer("ground", "v5e:2x2", batch=4))
    full = programs._slots(4, 2, 12 + 8, 8, 1, 2)
    assert program.useful == flops.step_flops(flops.forward_work(MODEL, full), ())
    assert (program.said, program.trips) == (32, 8)
    # Weights of the decoder without its embedding table, and keys and values of every row.
    language = MODEL.language
    cache = 2 * language.num_layers * 4 * (12 + 8) * language.num_kv_heads * language.head_dim * 2
    table = language.padded_vocab_size * language.hidden_size * 2
    weights = sum(
        leaf.size * leaf.dtype.itemsize
        for path, leaf in program.held["parameters"].items()
        if path.startswith("language_model.")
    )
    assert program.every_token == weights - table + cache


def test_peaks_of_chips_are_those_of_the_meter():
    from unibiomed_jax.planning.topologies import CHIPS

    for chip in CHIPS.values():
        (device,) = [type("Device", (), {"device_kind": chip.kind})]
        assert flops.peak_flops(device) == chip.peak


def test_devices_say_what_they_are():
    from unibiomed_jax.planning.topologies import find_topology

    for name, count in (
        ("v4:2x2x1", 4),
        ("v5p:2x2x1", 4),
        ("v6e:2x2", 4),
        ("tpu7x:2x2x1", 8),
        ("v6e:1x1", 1),
    ):
        topology = find_topology(name)
        devices = topology.devices()
        assert len(devices) == count == topology.chips * topology.chip.devices_per_chip
        assert devices[0].device_kind == topology.chip.kind
    assert jax.default_backend() == "cpu"
