"""`unibiomed plan`: estimates, search, and what is shown and written."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from planned import needs_tpu_compiler, small_answer

from unibiomed_jax.commands import plan as command
from unibiomed_jax.commands.plan import PlanOptions
from unibiomed_jax.errors import InputError
from unibiomed_jax.planning import report
from unibiomed_jax.planning.cases import answer_case, train_case
from unibiomed_jax.planning.facts import Compiled, Facts
from unibiomed_jax.planning.page import answers, page, training
from unibiomed_jax.planning.program_text import Collective
from unibiomed_jax.planning.roofline import estimate
from unibiomed_jax.planning.search import best, largest_batches
from unibiomed_jax.planning.topologies import CHIPS, find_topology

GIB = 2**30
MESH = {"replica": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
COMPILED = Compiled(
    arguments=3 * GIB,
    outputs=GIB,
    aliased=GIB,
    temporaries=2 * GIB,
    peak=5 * GIB,
    refused=None,
    collectives=(
        Collective("all-gather", ("fsdp",), 4, True, 4e9, 24.0),
        Collective("all-reduce", ("replica", "fsdp"), 8, False, 8e8, 1.0),
    ),
    traffic=8.19e9,
    kept=GIB,
    largest=((GIB, "f32[16384,16384]", "jit(step)/dot"),),
    unknown_loops=0,
    seconds=60.0,
    compiler_memory=3 * GIB,
)
FACTS = Facts(
    title="unibiomed-1b LoRA",
    program="update",
    topology="v5e:2x2@2",
    strategy="hsdp",
    mesh=MESH,
    devices=8,
    chips=8,
    samples=16,
    said=0,
    held={"trainable parameters": GIB, "frozen parameters": 2 * GIB},
    idle=0,
    operations={"bfloat16": 8 * 197e12 * 0.02, "float32 at 'highest'": 8 * 197e12 * 0.002},
    useful=8 * 197e12 * 0.016,
    every_token=0,
    trips=1,
    compiled=COMPILED,
    made_by={"code": "0", "jax": "0"},
)
REFUSED = dataclasses.replace(
    FACTS, compiled=dataclasses.replace(COMPILED, refused=(20.5 * GIB, 15.75 * GIB), peak=0)
)


def test_the_roofline_of_an_update():
    times = estimate(FACTS)
    assert times.compute == pytest.approx(0.02 + 6 * 0.002)  # float32 as six products
    assert times.memory == pytest.approx(0.01)
    # A gather over four neighbours, and a sum that goes around them, then between two slices.
    assert times.links == pytest.approx((4e9 * 3 / 4 + 8e8 * 2 * 3 / 4) / 90e9)
    assert times.network == pytest.approx(8e8 / 4 * 2 * 1 / 2 / 3.125e9)
    assert times.bound == "network" and times.seconds == times.network == pytest.approx(0.064)
    assert times.mfu == pytest.approx(0.25)
    assert times.samples_per_second == pytest.approx(250)
    assert times.days == pytest.approx(12_800_000 / 250 / 86_400)
    assert times.chip_hours == pytest.approx(times.days * 24 * 8)


def test_a_loop_over_tokens_is_held_against_what_it_cannot_but_read():
    said = dataclasses.replace(FACTS, program="advance", devices=1, said=16 * 10, every_token=8.19e8 / 1.1)
    times = estimate(said)
    assert times.reads_per_token == pytest.approx(1.1) and times.days is None
    assert times.tokens_per_second == pytest.approx(160 / times.seconds)
    assert estimate(dataclasses.replace(said, program="ground")).reads_per_token is None


def test_every_line_says_whether_it_is_a_fact():
    said = {line.name: line for line in report.lines(FACTS)}
    assert {line.source for line in said.values()} == {
        report.LAYOUT,
        report.PROGRAM,
        report.COMPILER,
        report.ESTIMATE,
    }
    assert said["fits"] == ("fits", "yes, 11.00 GiB free", report.COMPILER)
    assert said["peak"].value == "5.00 GiB of 16.00 GiB (TPU v5 lite)"
    assert said["all-gather over fsdp, in loops"].source == report.COMPILER
    assert said["all-reduce over replica+fsdp, once"].value == "762.9 MiB"
    assert said["at best"] == ("at best", "64.00 ms, bound by network", report.ESTIMATE)
    assert said["compilation"].value == "60 CPU seconds, process of 3.00 GiB"
    assert said["MFU"].source == said["images a second"].source == report.ESTIMATE
    said = {line.name: line.value for line in report.lines(REFUSED)}
    assert said["fits"] == "no: asks for 20.50 GiB of 15.75 GiB, 4.75 GiB too much"
    assert "at best" not in said and "operations, bfloat16" in said


def test_a_page_and_json_say_the_same_and_load_nothing():
    text = report.as_html([FACTS, REFUSED])
    assert "4.75 GiB too much" in text and "64.00 ms, bound by network" in text
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script", text)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", text)]
    # Of 16 GiB: trainable, frozen, kept for the way back, other temporaries; then times by the longest.
    assert widths[:4] == [6.25, 12.5, 6.25, 6.25] and max(widths[4:]) == 100
    fits, refused = json.loads(json.dumps(report.as_json([FACTS, REFUSED])))
    assert fits["fits"] and fits["estimates"]["bound"] == "network"
    assert fits["facts"]["compiled"]["temporaries"] == 2 * GIB
    assert not refused["fits"] and refused["bytes_left"] == -4.75 * GIB and "estimates" not in refused


@pytest.mark.parametrize("largest", [0, 1, 5, 8, 256])
def test_a_search_finds_the_largest_batch_of_every_strategy(largest):
    asked = []

    def find_all(cases):
        asked.append(cases)
        limits = {"fsdp": largest, "zero1": 3}
        return [
            dataclasses.replace(FACTS if size <= limits[name] else REFUSED, strategy=name, samples=16 * size)
            for name, size in cases
        ]

    found = largest_batches(["fsdp", "zero1"], lambda *case: case, find_all)
    assert found["zero1"].samples == 48 and report.fits(found["zero1"])[0]
    assert found["fsdp"].samples == 16 * max(1, largest)
    assert report.fits(found["fsdp"])[0] == (largest > 0)
    assert best([*found.values()]).strategy == ("fsdp" if largest > 3 else "zero1")
    assert len(asked) <= 16 and len(set(sum(asked, []))) == len(sum(asked, []))


def test_nothing_that_fits_is_best():
    assert best([REFUSED]) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", r"'v5e' cannot be read; .*v5e:4x4"),
        ("v6:2x2", r"'v6:2x2' names a chip that is not known; the nearest is v6e"),
        ("v5e:2x2x2", r"another number of axes.*4x4"),
        ("v5p:4x4", r"another number of axes.*2x2x4"),
        ("h100:2x2x8", "write nodes and GPUs, as in h100:4x8"),
        ("v5e:0x4", "has no chip"),
        ("v5e:1000x1000", "more than 16,384"),
    ],
)
def test_a_topology_that_cannot_be_is_refused_in_a_sentence(name, message):
    with pytest.raises(InputError, match=message):
        find_topology(name)


def test_the_extra_that_is_missing_is_named(monkeypatch):
    from unibiomed_jax.planning import topologies

    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; .*unibiomed-jax\[tpu\]"):
        topologies.require_compiler(CHIPS["v5e"])
    with pytest.raises(InputError, match=r"unibiomed-jax\[plan-gpu\]"):
        topologies.require_compiler(CHIPS["h200"])


SAMPLE = {"per_share": 2, "tiles": 1, "tokens": 1280, "objects": 4}


def test_cases_of_the_published_recipe():
    case = train_case("v5e:4x4", "1b", "lora", "fsdp", None, **SAMPLE)
    config = case.config
    assert (config.data.batch_size, config.optim.accumulate, config.mesh) == (32, 4, "fsdp=16")
    assert config.lora.rank == 128 and config.precision.language == "bfloat16"
    case = train_case("v5e:16x16", "7b", "full", "sequence", None, **SAMPLE)
    assert (case.config.data.batch_size, case.config.mesh) == (128, "fsdp=64,sequence=4")
    assert case.config.lora.rank == 0 and case.config.freeze.trainable == ("*",)
    assert case.config.model.language.hidden_size == 3584
    case = train_case("v5e:16x16@2", "1b", "lora", "hsdp", None, **SAMPLE)
    assert case.config.mesh == "replica=8,fsdp=64"
    with pytest.raises(InputError, match="mesh fsdp=3"):
        train_case("v5e:2x4", "1b", "lora", "fsdp", "fsdp=3", **SAMPLE)
    with pytest.raises(InputError, match="Unknown sharding strategy 'fsd'"):
        train_case("v5e:2x4", "1b", "lora", "fsd", None, **SAMPLE)
    answer = answer_case(
        "v5e:1x1",
        "3b",
        "ground",
        "data_parallel",
        None,
        batch=8,
        tiles=1,
        tokens=512,
        new_tokens=64,
        objects=1,
        frames=1,
    )
    assert answer.model.language.num_layers == 36 and answer.mesh == "replica=1"


def test_the_page_lists_what_was_not_compiled(tmp_path):
    text = page(tmp_path)
    assert "- unibiomed-1b LoRA, update, v5e:2x4, data_parallel" in text
    assert "| unibiomed" not in text and "| v5e | 16 GiB | 819 GB/s | 197.0 TFLOP/s |" in text


def test_the_command_compiles_the_rows_of_the_page():
    first = command._case(PlanOptions(), "v5e:2x4", "1b", "lora", "data_parallel", program="update", batch=1)
    assert first == next(training())
    asked = PlanOptions(tiles=5, tokens=1536)
    stage = command._case(asked, "v5e:1x1", "1b", "lora", "data_parallel", program="encode_tiles", batch=1)
    assert stage == next(answers())


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr(
        command, "_case", lambda options, *chosen, program, batch: small_answer(program, chosen[0])
    )


@needs_tpu_compiler
@pytest.mark.slow
def test_the_command_shows_and_writes_plans(small_cases, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.console, "width", 300, raising=False)
    files = {"json": tmp_path / "plans.json", "html": tmp_path / "plans.html", "kept": tmp_path / "kept"}
    options = PlanOptions(("v5e:2x2", "v5e:3x3"), program="encode_tiles", compare=True, memory=12, **files)
    assert command.plan(options) == command.FAILED_IN_PART
    shown = capsys.readouterr().out
    assert "small, encode_tiles on v5e:2x2" in shown.replace("\n", " ") or "encode_tiles" in shown
    assert "Left out: There is no topology 'v5e:3x3'" in shown
    (written,) = json.loads(files["json"].read_text())
    assert written["fits"] and written["facts"]["chips"] == 4
    assert files["html"].read_text().startswith("<!doctype html>")
    with pytest.raises(InputError, match="no topology 'v5e:3x3'"):
        command.plan(PlanOptions(("v5e:3x3",), program="encode_tiles", kept=tmp_path))
    with pytest.raises(InputError, match=r"--batch=0 is impossible"):
        command.plan(PlanOptions(batch=0))
    with pytest.raises(InputError, match="name one of the stages"):
        command.plan(PlanOptions(search=True, program="stages"))


def test_of_a_gpu_a_program_has_what_jax_takes():
    assert CHIPS["h100"].room == 0.75 * CHIPS["h100"].memory
    assert CHIPS["v5e"].room == CHIPS["v5e"].memory
