"""What the benchmarks count, against numbers known from elsewhere."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import pytest

from unibiomed_jax import sharding
from unibiomed_jax.config import ModelConfig
from unibiomed_jax.inference.precision import BFLOAT16, CPU
from unibiomed_jax.training.forward import count_targets
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.parameters import partition
from unibiomed_jax.training.step import TrainStep, init_state

FILE = Path(__file__).parents[1] / "benchmarks" / "cost.py"
SPEC = importlib.util.spec_from_file_location("cost", FILE)
cost = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cost)


def test_arithmetic_of_every_stage():
    """Counted by a tracer of the reference's operations, in GFLOP."""
    config = ModelConfig()
    for work, expected in (
        (cost.encode_tile(config), 725.9),
        (cost.prefill(config, 1900), 1515),
        (cost.encode_image(config), 1823),
        (cost.decode_masks(config, 1), 3.66),
    ):
        assert work["float32"] / 1e9 == pytest.approx(expected, rel=1e-3)


def test_formats_follow_the_precision():
    mixed = cost.encode_image(dataclasses.replace(ModelConfig(), precision=CPU))
    assert sum(mixed.values()) == cost.encode_image(ModelConfig())["float32"]
    assert set(mixed) == {"float32", "bfloat16"}
    half = dataclasses.replace(ModelConfig(), precision=BFLOAT16)
    assert set(cost.prefill(half, 281)) == {"bfloat16"}
    whole, split = cost.prefill(ModelConfig(), 281)["float32"], cost.prefill(ModelConfig(), 281, parts=2)
    assert split["bfloat16"] / 2 + split["float32"] == pytest.approx(whole)
    assert cost.cache_bytes(half, 1) == 12_288
    assert cost.cache_bytes(ModelConfig(), 1) == 2 * 12_288


@pytest.mark.parametrize("size", ("tiny", "full"))
def test_training_batch_fits_the_model(size, monkeypatch):
    """One update is traced at its real size, but neither compiled nor run."""
    monkeypatch.syspath_prepend(str(FILE.parent))
    worker = importlib.import_module("train_jax")
    config = worker.training_config(size, "float32")
    batch, ids = worker.random_batch(config.model, 2, worker.TEXT_TOKENS[size])
    graphdef, shapes = structure(config)
    trainable, frozen = partition(shapes, config.freeze.trainable, config.freeze.frozen)
    state = jax.eval_shape(lambda table: init_state(table, config), trainable)
    step = TrainStep(graphdef, config, ids, sharding.make_mesh(jax.devices()[:1]), sharding.DATA_PARALLEL)
    after, metrics = jax.eval_shape(step.whole, state, frozen, batch)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)

    counts = count_targets(batch, ids, config.loss)
    assert (counts.tokens, counts.masks) == (2 * worker.ANSWER_TOKENS, 2)
    assert batch["input_ids"].shape == (2, {"tiny": 80, "full": 300}[size])
