import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from places import ROOT, TESTS

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import count, partition, split
from unibiomed_jax.sharding.axes import FUSED, axis_units, logical_axes
from unibiomed_jax.sharding.layout import AxisLayout, Layout
from unibiomed_jax.sharding.strategies import DATA_PARALLEL, FSDP, STRATEGIES, find_strategy
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import REFERENCE_FREEZE, FreezeConfig

EIGHT = AbstractMesh((8,), ("data",))
TWO_BY_FOUR = AbstractMesh((2, 4), ("data", "model"))
UNITS = axis_units(ModelConfig())
Q_PROJ = "language_model.layers.self_attn.q_proj.kernel"
O_PROJ = "language_model.layers.self_attn.o_proj.kernel"


@pytest.fixture(scope="module")
def full():
    """Shapes of all parameters of the published model with the reference's adapters."""

    def make():
        model = UniBiomedModel(ModelConfig(), FLOAT32, rngs=nnx.Rngs(0))
        lora.attach(model, lora.DECODER_LAYERS, rank=128, alpha=256, dropout=0.05, rngs=nnx.Rngs(params=1))
        return model

    return split(nnx.eval_shape(make))[1]


def test_the_reference_trains_as_many_numbers_as_published(full):
    padding = 151_680 - 151_679
    adapters = {path: value for path, value in full.items() if ".lora." in path}
    assert count(adapters) == 70_385_664
    assert count(full, padding) - 70_385_664 == 1_163_665_714
    trainable, _ = partition(full, REFERENCE_FREEZE.trainable, REFERENCE_FREEZE.frozen)
    assert count(trainable, padding) == 359_238_833


def test_by_default_nothing_trains_that_no_loss_reaches(full):
    trainable, _ = partition(full, FreezeConfig().trainable, FreezeConfig().frozen)
    assert not any("memory" in path or "iou_pred" in path or "obj_score_head" in path for path in trainable)


def test_every_parameter_has_a_meaning(full):
    for path, value in full.items():
        assert len(logical_axes(path, value.ndim)) == value.ndim
    assert logical_axes("language_model.layers.mlp.up_proj.lora.a", 3) == ("layer", "embed", "rank")
    assert logical_axes("language_model.layers.mlp.up_proj.lora.b", 3) == ("layer", "rank", "mlp")
    assert logical_axes("sam2.mask_downsample.kernel", 4) == (None,) * 4


@pytest.mark.parametrize("path, ndim", [("language_model.new", 2), ("vision_model.layers.norm1.scale", 4)])
def test_a_parameter_without_a_row_is_named(path, ndim):
    with pytest.raises(InputError, match=path.replace(".", r"\.")):
        logical_axes(path, ndim)


def test_data_parallel_keeps_parameters_whole_and_fsdp_splits_what_is_large(full):
    whole = Layout(EIGHT, DATA_PARALLEL, UNITS).explain(full)
    assert all(row.spec == PartitionSpec(*[None] * len(row.shape)) for row in whole)
    assert not any(row.obstacles for row in whole)
    total = sum(row.bytes_per_device for row in whole)
    assert total == sum(value.size * value.dtype.itemsize for value in full.values())
    split_rows = Layout(EIGHT, FSDP, UNITS).explain(full)
    # Whole stay norms, biases and what eight does not divide.
    assert sum(row.bytes_per_device for row in split_rows) < total / 8 * 1.06
    by_path = {row.path: row for row in split_rows}
    assert by_path["language_model.embed_tokens"].spec == PartitionSpec(None, "data")
    assert by_path["language_model.layers.mlp.down_proj.kernel"].spec == PartitionSpec(None, None, "data")
    costs = [row.bytes_per_device for row in split_rows]
    assert costs == sorted(costs, reverse=True)


def test_an_axis_the_mesh_does_not_divide_stays_whole():
    layout = Layout(AbstractMesh((5,), ("data",)), FSDP, UNITS)
    assert layout.spec("mlp1.linear2.kernel", (896, 896)) == PartitionSpec(None, None)
    assert layout.axes("mlp1.linear2.kernel", (896, 896)) == [
        AxisLayout((), "its embed axis of 896 numbers does not divide by 5"),
        AxisLayout((), None),
    ]


def test_a_head_is_never_cut_apart(full):
    """8 divides the 896 columns of 14 heads, but not the heads."""
    layout = Layout(EIGHT, {"heads": "data", "kv_heads": "data", "vision_heads": "data"}, UNITS)
    assert layout.axes(Q_PROJ, full[Q_PROJ].shape) == [
        AxisLayout((), None),
        AxisLayout((), None),
        AxisLayout((), "its heads axis of 14 units of 64 does not divide by 8"),
    ]
    kv = layout.axes("language_model.layers.self_attn.k_proj.bias", (24, 128))
    assert kv[1].obstacle == "its kv_heads axis of 2 units of 64 does not divide by 8"
    vision = "vision_model.layers.attn.proj.kernel"
    assert layout.spec(vision, full[vision].shape) == PartitionSpec(None, "data", None)

    two = Layout(AbstractMesh((2,), ("data",)), layout.strategy, UNITS)
    assert two.spec(Q_PROJ, full[Q_PROJ].shape) == PartitionSpec(None, None, "data")
    # The columns of an adapter are those of its kernel.
    adapter = "language_model.layers.self_attn.q_proj.lora.b"
    assert layout.spec(adapter, full[adapter].shape) == PartitionSpec(None, None, None)
    assert two.spec(adapter, full[adapter].shape) == PartitionSpec(None, None, "data")


def test_every_unit_is_of_an_axis_that_exists_and_divides_it(full):
    seen = set()
    for path, value in full.items():
        for size, meaning in zip(value.shape, logical_axes(path, value.ndim), strict=True):
            if meaning in UNITS:
                assert size % UNITS[meaning] == 0, path
                seen.add(meaning)
    assert seen == set(UNITS)


def test_what_lies_side_by_side_is_never_divided_and_says_so(full):
    layout = Layout(EIGHT, dict.fromkeys(FUSED, "data"), UNITS)
    fused = {path: value for path, value in full.items() if ".qkv." in path}
    assert {path.split(".")[0] for path in fused} == {"vision_model", "sam2"}
    for row in layout.explain(fused):
        assert row.spec == PartitionSpec(*[None] * len(row.shape))
        (obstacle,) = row.obstacles
        meaning = row.meanings[-1]
        assert meaning in FUSED and obstacle == (
            f"its {meaning} axis holds queries, keys and values side by side"
        )
    one = Layout(AbstractMesh((1,), ("data",)), layout.strategy, UNITS)
    assert not any(row.obstacles for row in one.explain(fused))


def test_two_mesh_axes_may_divide_an_axis_together(full):
    layout = Layout(TWO_BY_FOUR, {"batch": ("data", "model"), "embed": ("data", "model")}, UNITS)
    embedding = "language_model.embed_tokens"
    assert layout.spec(embedding, full[embedding].shape) == PartitionSpec(None, ("data", "model"))
    (row,) = layout.explain({embedding: full[embedding]})
    assert row.bytes_per_device == full[embedding].size * 4 // 8
    # 12 divides by 2 and by 4, but not by 8.
    (first, _) = layout.axes("mlp1.linear2.kernel", (12, 12))
    assert first == AxisLayout((), "its embed axis of 12 numbers does not divide by 8")
    assert layout.batch.spec == PartitionSpec(("data", "model"))
    layout.require_divisible(16)
    with pytest.raises(InputError, match="12 samples cannot be split over 8 devices: .* a multiple of 8"):
        layout.require_divisible(12)
    Layout(TWO_BY_FOUR, DATA_PARALLEL, UNITS).require_divisible(2)


def test_a_mesh_axis_divides_an_array_once(full):
    gate = "language_model.layers.mlp.gate_proj.kernel"
    shape = full[gate].shape
    once = Layout(EIGHT, {"embed": "data", "mlp": "data"}, UNITS)
    assert once.axes(gate, shape) == [AxisLayout((), None), AxisLayout(("data",), None), AxisLayout((), None)]
    # What is left of two mesh axes divides the second axis; each of them is used once.
    both = Layout(TWO_BY_FOUR, {"embed": "data", "mlp": ("data", "model")}, UNITS)
    assert both.spec(gate, shape) == PartitionSpec(None, "data", "model")
    # Where the first axis cannot be divided, the second may be.
    second = Layout(EIGHT, {"heads": "data", "embed": "data"}, UNITS)
    assert second.spec(O_PROJ, full[O_PROJ].shape) == PartitionSpec(None, None, "data")


def test_explain_lists_what_stands_in_the_way():
    shapes = {
        O_PROJ: jax.ShapeDtypeStruct((24, 896, 12), np.float32),
        "language_model.norm.scale": jax.ShapeDtypeStruct((896,), np.float32),
        "mlp1.linear2.kernel": jax.ShapeDtypeStruct((16, 4), np.float32),
    }
    rows = Layout(EIGHT, {"heads": "data", "embed": "data"}, UNITS).explain(shapes)
    assert [tuple(row) for row in rows] == [
        (
            O_PROJ,
            (24, 896, 12),
            ("layer", "heads", "embed"),
            PartitionSpec(None, None, None),
            24 * 896 * 12 * 4,
            (
                "its heads axis of 14 units of 64 does not divide by 8",
                "its embed axis of 12 numbers does not divide by 8",
            ),
        ),
        ("language_model.norm.scale", (896,), (None,), PartitionSpec(None), 896 * 4, ()),
        ("mlp1.linear2.kernel", (16, 4), ("embed", None), PartitionSpec("data", None), 16 * 4 * 4 // 8, ()),
    ]  # fmt: skip


def test_what_belongs_to_a_parameter_lies_as_it_does():
    """Gradients and moments lie beside their parameter; a counter is whole everywhere."""
    layout = Layout(EIGHT, FSDP, UNITS)
    leaf = jax.ShapeDtypeStruct((896, 896), np.float32)
    table = {"mlp1.linear2.kernel": leaf}
    tree = {"step": jax.ShapeDtypeStruct((), np.int32), "trainable": table, "moments": (table, {"mu": table})}
    specs = jax.tree.map(lambda place: place.spec, layout.tree(tree))
    divided = {"mlp1.linear2.kernel": PartitionSpec("data", None)}
    assert specs == {"step": PartitionSpec(), "trainable": divided, "moments": (divided, {"mu": divided})}
    abstract = layout.abstract(tree)
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, abstract) == specs
    assert (
        abstract["step"].dtype == np.int32
        and abstract["trainable"]["mlp1.linear2.kernel"].shape == leaf.shape
    )


def test_impossible_choices_are_named():
    with pytest.raises(InputError, match="fsdp"):
        find_strategy("fsdb")
    with pytest.raises(InputError, match="6 samples.*8 devices"):
        Layout(EIGHT, FSDP, UNITS).require_divisible(6)


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """What a process with eight CPU devices reports; see sharded_step.py."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    script = TESTS / "support" / "sharded_step.py"
    folder = tmp_path_factory.mktemp("sharded")
    result = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (
            {"batch": "model"},
            "divides 'batch' over 'model', but the mesh has the axes data; give it",
        ),
        (
            {"batch": "data", "embed": ("data", "x")},
            "divides 'embed' over 'x', but the mesh has",
        ),
        (
            {"batch": "data", "embedding": "data"},
            "divides 'embedding', which is no meaning of an axis",
        ),
    ],
)
def test_a_strategy_that_does_not_fit_is_one_sentence(strategy, sentence):
    with pytest.raises(InputError, match=sentence):
        Layout(EIGHT, strategy, UNITS)


def test_a_strategy_may_leave_batches_whole():
    layout = Layout(EIGHT, {"embed": "data"}, UNITS)
    assert layout.batch.spec == PartitionSpec(None)
    layout.require_divisible(3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eight_devices_compute_what_one_does(eight_devices, strategy):
    found = eight_devices[strategy]
    assert found["loss"] < 1e-5 and found["gradient"] < 1e-5 and found["norm"] < 1e-5


@pytest.mark.slow
def test_devices_encode_their_own_images_without_talking(eight_devices):
    assert eight_devices["trunk_collectives"] == 0


@pytest.mark.slow
def test_a_program_knows_what_it_is_compiled_for(eight_devices):
    assert eight_devices["targets"] == {"none": [None, 1], "one": ["cpu", 1], "eight": ["cpu", 8]}


@pytest.mark.slow
def test_fsdp_spreads_parameters_and_moments(eight_devices):
    assert eight_devices["fsdp"]["bytes"] < 0.5 * eight_devices["data_parallel"]["bytes"]


@pytest.mark.slow
def test_a_run_says_which_parameters_stay_whole(eight_devices):
    (counts,) = eight_devices["data_parallel"]["said"]
    assert counts == (
        "3,854 of 270,406 parameters train on 8 cpu, 12 records, 3 batches an epoch, 20 updates of 1 batches "
        "of 4."
    )
    # Adapters of rank 2 whose other axis is no "embed" axis, and maps of 1 and 4 channels. The other adapters
    # are divided along their other axis.
    assert eight_devices["fsdp"]["said"] == [
        counts,
        "12 parameters (0.0 MiB a device) stay whole although 'fsdp' asks to divide them; the largest is "
        "sam2.memory_encoder.mask_downsampler.convs.1.kernel: its mask axis of 4 numbers does not divide by "
        "8.",
    ]


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_restores_onto_any_mesh_to_the_bit(eight_devices):
    assert eight_devices["restored"] == {"1": True, "4": True, "8": True}


def test_one_device_needs_no_special_case():
    layout = Layout.over(jax.devices()[:1], FSDP, ModelConfig())
    assert layout.spec("mlp1.linear2.kernel", (8, 8)) == PartitionSpec("data", None)
    kernel = np.arange(64, dtype=np.float32).reshape(8, 8)
    placed = layout.place({"mlp1.linear2.kernel": kernel})["mlp1.linear2.kernel"]
    np.testing.assert_array_equal(placed, kernel)
    assert placed.sharding == layout.parameter("mlp1.linear2.kernel", (8, 8))
