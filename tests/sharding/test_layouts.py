import math
import re
from collections import Counter

import jax
import lowered
import numpy as np
import pytest
from eight import report
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import count, partition, split
from unibiomed_jax.sharding.axes import axis_units, logical_axes, tower_of
from unibiomed_jax.sharding.layout import Layout, mesh_sizes, parse_mesh
from unibiomed_jax.sharding.strategies import FSDP, MESH_AXES, STRATEGIES, find_strategy
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import REFERENCE_FREEZE, FreezeConfig

UNITS = axis_units(ModelConfig())
Q_PROJ = "language_model.layers.self_attn.q_proj.kernel"
O_PROJ = "language_model.layers.self_attn.o_proj.kernel"
GATE = "language_model.layers.mlp.gate_proj.kernel"
EMBEDDING = "language_model.embed_tokens"


def layout_of(strategy, **mesh):
    strategy = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    return Layout.abstractly(strategy, ModelConfig(), mesh)


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
    whole = layout_of("data_parallel", replica=8).explain(full)
    assert all(row.spec == PartitionSpec(*[None] * len(row.shape)) for row in whole)
    assert not any(row.obstacles for row in whole)
    total = sum(row.bytes_per_device for row in whole)
    assert total == sum(value.size * value.dtype.itemsize for value in full.values())
    rows = layout_of("fsdp", fsdp=8).explain(full)
    # Whole stay norms, biases and what eight does not divide.
    assert sum(row.bytes_per_device for row in rows) < total / 8 * 1.01
    costs = [row.bytes_per_device for row in rows]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        (EMBEDDING, PartitionSpec("fsdp", None)),
        (GATE, PartitionSpec(None, None, "fsdp")),  # the longer axis
        (Q_PROJ, PartitionSpec(None, "fsdp", None)),
        ("vision_model.layers.attn.qkv.kernel", PartitionSpec(None, None, "fsdp")),  # gathered before its use
        ("vision_model.layers.norm1.scale", PartitionSpec(None, None)),
        ("language_model.layers.mlp.up_proj.lora.a", PartitionSpec(None, "fsdp", None)),
        ("sam2.image_encoder.trunk.runs.0.mlp.fc1.kernel", PartitionSpec(None, None, "fsdp")),
    ],
)
def test_stored_shares_are_of_the_longest_axis_that_divides(full, path, spec):
    assert layout_of("fsdp", fsdp=16).spec(path, full[path].shape) == spec
    assert layout_of("fsdp", fsdp=16).spec(path, full[path].shape, "computed") == PartitionSpec(
        *[None] * len(spec)
    )


def test_another_axis_takes_over_where_one_does_not_divide(full):
    """128 divides 896, 256 does not."""
    assert layout_of("fsdp", fsdp=256).spec(GATE, full[GATE].shape) == PartitionSpec(None, None, "fsdp")
    lora = "language_model.layers.mlp.down_proj.lora.a"
    assert layout_of("fsdp", fsdp=256).spec(lora, full[lora].shape) == PartitionSpec(None, "fsdp", None)
    (row,) = layout_of("fsdp", fsdp=256).explain({Q_PROJ: full[Q_PROJ]})
    assert row.obstacles == ("no axis of 896x896 divides by 256",)
    # Of two mesh axes the one that divides is taken.
    hsdp = layout_of("hsdp", replica=4, fsdp=128)
    assert hsdp.spec(Q_PROJ, full[Q_PROJ].shape, "optimizer") == PartitionSpec(None, "fsdp", None)


def test_fsdp_that_does_not_spread_is_refused_with_what_does(full):
    for strategy, mesh in (("fsdp", {"fsdp": 64}), ("hsdp", {"replica": 4, "fsdp": 64})):
        layout_of(strategy, **mesh).require_useful(full, "optimizer")
    with pytest.raises(
        InputError, match="MiB of .* stay whole .* divides by 256.*hsdp --mesh replica=2,fsdp=128"
    ):
        layout_of("fsdp", fsdp=256).require_useful(full, "optimizer")


def test_zero1_divides_what_the_optimiser_keeps(full):
    layout = layout_of("zero1", replica=8)
    shape = full[GATE].shape
    assert layout.spec(GATE, shape) == PartitionSpec(None, None, None)
    assert layout.spec(GATE, shape, "optimizer") == PartitionSpec(None, None, "replica")


def test_tensor_parallelism_never_cuts_a_head_apart(full):
    layout = layout_of("fsdp_tensor", fsdp=4, tensor=2)
    assert layout.spec(Q_PROJ, full[Q_PROJ].shape, "computed") == PartitionSpec(None, None, "tensor")
    assert layout.spec(Q_PROJ, full[Q_PROJ].shape) == PartitionSpec(None, "fsdp", "tensor")
    assert layout.spec(O_PROJ, full[O_PROJ].shape, "computed") == PartitionSpec(None, "tensor", None)
    assert layout.spec(GATE, full[GATE].shape) == PartitionSpec(None, None, ("tensor", "fsdp"))
    # The columns of an adapter are those of its kernel.
    adapter = "language_model.layers.self_attn.q_proj.lora.b"
    assert layout.spec(adapter, full[adapter].shape, "computed") == PartitionSpec(None, None, "tensor")
    # The vision tower is not divided: its tiles are.
    vision = "vision_model.layers.mlp.fc1.kernel"
    assert layout.spec(vision, full[vision].shape, "computed") == PartitionSpec(None, None, None)
    assert layout.activation((16, 5, 7), ("vision.tiles", None, None)) == PartitionSpec(
        ("fsdp", "tensor"), None, None
    )
    with pytest.raises(
        InputError, match="14 heads of .*_proj.kernel do not divide by the 4 .*; the nearest that does is 2"
    ):
        layout_of("tensor", replica=2, tensor=4).require_useful(full)
    # Keys and values of few heads are copied on purpose.
    keys = Q_PROJ.replace("q_proj", "k_proj")
    assert layout_of("tensor", tensor=7).spec(keys, full[keys].shape) == PartitionSpec(None, None, None)


def test_a_strategy_may_speak_of_one_tower(full):
    layout = layout_of(
        {"batch": "fsdp", "weights": "fsdp", "sam2.weights": (), "vision.mlp": "tensor"}, fsdp=4, tensor=2
    )
    trunk = "sam2.image_encoder.trunk.runs.0.mlp.fc1.kernel"
    assert layout.spec(trunk, full[trunk].shape) == PartitionSpec(None, None, None)
    assert layout.spec(GATE, full[GATE].shape) == PartitionSpec(None, None, "fsdp")
    fc1 = "vision_model.layers.mlp.fc1.kernel"
    assert layout.spec(fc1, full[fc1].shape) == PartitionSpec(None, None, ("tensor", "fsdp"))


def test_every_unit_is_of_an_axis_that_exists_and_divides_it(full):
    seen = set()
    for path, value in full.items():
        for size, meaning in zip(value.shape, logical_axes(path, value.ndim), strict=True):
            name = f"{tower_of(path)}.{meaning}"
            if name in UNITS:
                assert size % UNITS[name] == 0, path
                seen.add(name)
    assert seen == set(UNITS)


def test_activations_are_divided_as_far_as_they_divide():
    layout = layout_of("sequence", fsdp=2, sequence=4)
    tokens = ("batch", "language.tokens", None)
    assert layout.activation((8, 1280, 896), tokens) == PartitionSpec("fsdp", "sequence", None)
    # A token that is decoded cannot be divided.
    assert layout.activation((8, 1, 896), tokens) == PartitionSpec("fsdp", None, None)
    assert layout.activation((6, 4), ("sam2.images", None)) == PartitionSpec("fsdp", None)
    assert layout.activation((5, 4), ("sam2.images", None)) == PartitionSpec(None, None)
    with pytest.raises(InputError, match="two axes of an activation .* over fsdp"):
        layout.activation((8, 8), ("batch", "vision.tiles"))


def test_what_belongs_to_a_parameter_lies_as_it_does():
    """Gradients and moments lie beside their parameter; a counter is whole everywhere."""
    layout = layout_of("zero1", replica=8)
    leaf = jax.ShapeDtypeStruct((896, 896), np.float32)
    table = {"mlp1.linear2.kernel": leaf}
    tree = {"step": jax.ShapeDtypeStruct((), np.int32), "trainable": table, "moments": (table, {"mu": table})}
    specs = jax.tree.map(lambda place: place.spec, layout.tree(tree, "optimizer"))
    divided = {"mlp1.linear2.kernel": PartitionSpec("replica", None)}
    assert specs == {"step": PartitionSpec(), "trainable": divided, "moments": (divided, {"mu": divided})}
    abstract = layout.abstract(tree, "optimizer")
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, abstract) == specs
    assert (
        abstract["step"].dtype == np.int32
        and abstract["trainable"]["mlp1.linear2.kernel"].shape == leaf.shape
    )


def test_impossible_choices_are_named():
    with pytest.raises(InputError, match="fsdp"):
        find_strategy("fsdb")
    with pytest.raises(InputError, match="6 samples.*8 devices"):
        layout_of("fsdp", fsdp=8).require_divisible(6)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "fsdp=x", "fsdp=4,data=2", "fsdp=2,fsdp=4", ""])
def test_a_mesh_that_cannot_be_read_is_one_sentence(text):
    with pytest.raises(InputError, match="cannot be read at .*fsdp=4,tensor=2"):
        parse_mesh(text)
    assert parse_mesh("fsdp=4, tensor=2") == {"fsdp": 4, "tensor": 2}


def test_a_mesh_fits_the_devices_and_says_how_where_there_is_a_choice():
    assert mesh_sizes(None, STRATEGIES["fsdp"], 8) == {"replica": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    with pytest.raises(InputError, match="has 6 devices, but there are 8; for example fsdp=4,tensor=2 fits"):
        mesh_sizes({"fsdp": 3, "tensor": 2}, STRATEGIES["fsdp_tensor"], 8)
    with pytest.raises(InputError, match="how the 8 devices are spread, for example --mesh replica=2,fsdp=4"):
        mesh_sizes(None, STRATEGIES["hsdp"], 8)
    assert math.prod(mesh_sizes(None, STRATEGIES["hsdp"], 1).values()) == 1


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """What a process with eight CPU devices reports; see sharded_step.py."""
    return report("sharded_step.py", str(tmp_path_factory.mktemp("sharded")))


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        ({"batch": "model"}, "divides 'batch' over 'model', but the mesh has the axes replica"),
        ({"batch": "fsdp", "weights": ("fsdp", "x")}, "divides 'weights' over 'x', but the mesh has"),
        ({"batch": "fsdp", "embedding": "fsdp"}, "divides 'embedding', which is no meaning of an axis"),
        ({"batch": "replica"}, "has fsdp=8, but the strategy divides nothing over 'fsdp'"),
    ],
)
def test_a_strategy_that_does_not_fit_is_one_sentence(strategy, sentence):
    with pytest.raises(InputError, match=sentence):
        Layout(AbstractMesh((1, 8, 1, 1), MESH_AXES), strategy, UNITS)


def test_a_strategy_may_leave_batches_whole():
    layout = layout_of({"weights": "fsdp"}, fsdp=8)
    assert layout.batch.spec == PartitionSpec(None)
    layout.require_divisible(3)


@pytest.mark.scale
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eight_devices_compute_what_one_does(eight_devices, strategy):
    """Five updates, with dropout, dropped paths and random points."""
    found = eight_devices[strategy]
    assert found["loss"] < 1e-5 and found["gradient"] < 1e-5


@pytest.mark.scale
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_device_works_on_its_share_alone(eight_devices, strategy):
    found = eight_devices[strategy]
    assert 0.9 < found["flops"] < 1.1
    batches = [
        shape
        for _, shapes, _, _ in found["collectives"]
        for shape in shapes
        if any(size and size % eight_devices["batch"] == 0 for size in shape)
    ]
    assert not batches


@pytest.mark.scale
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_stack_of_layers_is_gathered_as_a_whole(eight_devices, strategy):
    gathered = [
        tuple(shape)
        for kind, shapes, _, _ in eight_devices[strategy]["collectives"]
        for shape in shapes
        if kind == "all-gather"
    ]
    # Where the optimiser has smaller shares than the weights, what trains is gathered once an update.
    optimizer = "optimizer" in STRATEGIES[strategy]
    stacks = {tuple(shape) for shape, frozen in eight_devices["stacks"] if frozen or not optimizer}
    assert len(stacks) > 5 and not stacks.intersection(gathered)
    if strategy in ("fsdp", "hsdp", "fsdp_tensor", "sequence"):
        assert any((1, *shape[1:]) in gathered for shape in stacks)


@pytest.mark.scale
def test_fsdp_gathers_each_weight_as_often_as_it_is_used_and_sums_gradients_once(eight_devices):
    once, again, gradients = eight_devices["fsdp"]["needed"]
    moved = Counter()
    for kind, _, size, times in eight_devices["fsdp"]["collectives"]:
        assert times > 0
        moved[kind] += size * times
    # A CPU's compiler makes no sum that leaves every device its share but where it is told to.
    assert set(moved) == {"all-gather", "all-reduce", "reduce-scatter"}
    # What eight do not divide stays whole: a few hundred bytes.
    assert 0.99 * (once + again) < moved["all-gather"] <= once + again
    assert moved["all-reduce"] + 8 * moved["reduce-scatter"] < 1.2 * gradients


@pytest.mark.scale
def test_devices_encode_their_own_images_without_talking(eight_devices):
    assert eight_devices["trunk_collectives"] == 0


@pytest.mark.scale
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_drop_the_same_bits_under_every_strategy(eight_devices, strategy):
    assert eight_devices["dropped"][strategy]


@pytest.mark.scale
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plan_says_what_the_compiled_update_takes(eight_devices, strategy):
    """Bytes of arguments as the layout has them and as the compiler does; which mesh axes are talked over."""
    planned, compiled = eight_devices[strategy]["held"]
    assert planned == compiled
    kept, temporaries = eight_devices[strategy]["kept"]
    assert 0 < kept < temporaries
    used = {
        axis for axes in STRATEGIES[strategy].values() for axis in ([axes] if isinstance(axes, str) else axes)
    }
    assert set(eight_devices[strategy]["axes"]) <= used and eight_devices[strategy]["axes"]


@pytest.mark.scale
def test_a_program_knows_what_it_is_compiled_for(eight_devices):
    assert eight_devices["targets"] == {"none": [None, 1], "one": ["cpu", 1], "eight": ["cpu", 8]}


@pytest.mark.scale
def test_a_program_for_tpus_is_the_same_from_one_and_from_eight_cpus(eight_devices):
    assert eight_devices["lowered"] == lowered.digest()


@pytest.mark.scale
@pytest.mark.parametrize("strategy", ["zero1", "fsdp", "hsdp", "fsdp_tensor", "sequence"])
def test_masters_and_moments_are_spread(eight_devices, strategy):
    assert eight_devices[strategy]["bytes"] < 0.3 * eight_devices["data_parallel"]["bytes"]


@pytest.mark.scale
def test_a_run_says_which_parameters_stay_whole(eight_devices):
    counts, whole = eight_devices["summary"]
    assert (
        "parameters train on 8 cpu, 12 records, 3 batches an epoch, 20 updates of 1 batches of 4." in counts
    )
    # Maps of 1 and 4 channels, and a hidden state of two numbers.
    assert re.fullmatch(
        r"\d+ parameters \(0\.0 MiB a device\) stay whole although 'fsdp' asks to divide them; the largest "
        r"is sam2\.\S+: no axis of [\dx]+ divides by 8\.",
        whole,
    )


@pytest.mark.scale
def test_a_checkpoint_restores_onto_any_mesh_to_the_bit(eight_devices):
    restored = eight_devices["restored"]
    assert len(restored) == 2 * len(STRATEGIES) and all(restored.values())


def test_one_device_needs_no_special_case():
    layout = Layout.over(jax.devices()[:1], FSDP, ModelConfig())
    assert layout.spec("mlp1.linear2.kernel", (8, 8)) == PartitionSpec(None, None)
    kernel = np.arange(64, dtype=np.float32).reshape(8, 8)
    placed = layout.place({"mlp1.linear2.kernel": kernel})["mlp1.linear2.kernel"]
    np.testing.assert_array_equal(placed, kernel)
    assert placed.sharding == layout.parameter("mlp1.linear2.kernel", (8, 8))
