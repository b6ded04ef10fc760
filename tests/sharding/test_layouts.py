import json
import os
import subprocess
import sys

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from places import ROOT, TESTS

from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.errors import InputError
from unibiomed_jax.models.unibiomed import UniBiomedModel
from unibiomed_jax.parameters import count, partition, split
from unibiomed_jax.sharding import layout as sharding
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training import lora
from unibiomed_jax.training.config import REFERENCE_FREEZE, FreezeConfig

EIGHT = AbstractMesh((8,), ("data",))


@pytest.fixture(scope="module")
def full():
    """Shapes of all parameters of the published model with the reference's adapters."""

    def make():
        model = UniBiomedModel(ModelConfig(), rngs=nnx.Rngs(0))
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
        assert len(sharding.logical_axes(path, value.ndim)) == value.ndim
    assert sharding.logical_axes("language_model.layers.mlp.up_proj.lora.a", 3) == ("layer", "embed", "rank")
    assert sharding.logical_axes("language_model.layers.mlp.up_proj.lora.b", 3) == ("layer", "rank", "mlp")
    assert sharding.logical_axes("sam2.mask_downsample.kernel", 4) == (None,) * 4


@pytest.mark.parametrize("path, ndim", [("language_model.new", 2), ("vision_model.layers.norm1.scale", 4)])
def test_a_parameter_without_a_row_is_named(path, ndim):
    with pytest.raises(InputError, match=path.replace(".", r"\.")):
        sharding.logical_axes(path, ndim)


def test_data_parallel_keeps_parameters_whole_and_fsdp_splits_what_is_large(full):
    whole = sharding.explain(full, sharding.DATA_PARALLEL, EIGHT)
    assert all(row.spec == PartitionSpec(*[None] * len(row.shape)) for row in whole)
    total = sum(row.bytes_per_device for row in whole)
    split_rows = sharding.explain(full, sharding.FSDP, EIGHT)
    # Whole stay norms, biases and what eight does not divide.
    assert sum(row.bytes_per_device for row in split_rows) < total / 8 * 1.06
    by_path = {row.path: row for row in split_rows}
    assert by_path["language_model.embed_tokens"].spec == PartitionSpec(None, "data")
    assert by_path["language_model.layers.mlp.down_proj.kernel"].spec == PartitionSpec(None, None, "data")


def test_an_axis_the_mesh_does_not_divide_stays_whole():
    mesh = AbstractMesh((5,), ("data",))
    assert sharding.partition_spec("mlp1.linear2.kernel", (896, 896), sharding.FSDP, mesh) == PartitionSpec(
        None, None
    )


def test_impossible_choices_are_named():
    with pytest.raises(InputError, match="fsdp"):
        sharding.find_strategy("fsdb")
    with pytest.raises(InputError, match="6 samples.*8 devices"):
        sharding.require_divisible(6, sharding.FSDP, EIGHT)


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


@pytest.mark.parametrize("strategy", ["data_parallel", "fsdp"])
def test_eight_devices_compute_what_one_does(eight_devices, strategy):
    found = eight_devices[strategy]
    assert found["loss"] < 1e-5 and found["gradient"] < 1e-5 and found["norm"] < 1e-5


def test_devices_encode_their_own_images_without_talking(eight_devices):
    assert eight_devices["trunk_collectives"] == 0


def test_fsdp_spreads_parameters_and_moments(eight_devices):
    assert eight_devices["fsdp"]["bytes"] < 0.5 * eight_devices["data_parallel"]["bytes"]


def test_a_checkpoint_of_eight_devices_restores_onto_any_mesh_to_the_bit(eight_devices):
    assert eight_devices["restored"] == {"1": True, "4": True, "8": True}


def test_one_device_needs_no_special_case():
    mesh = Layout.over(jax.devices()[:1])
    assert sharding.partition_spec("mlp1.linear2.kernel", (8, 8), sharding.FSDP, mesh) is not None
