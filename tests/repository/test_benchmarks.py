"""What the benchmarks count, against numbers known from elsewhere."""

import importlib.util
import sys

import jax
import pytest
from places import ROOT

from unibiomed_jax.config.fields import to_dict
from unibiomed_jax.config.model import ModelConfig
from unibiomed_jax.config.precision import BFLOAT16, FAST, FLOAT32
from unibiomed_jax.parameters import count, matches, partition
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training.forward import count_targets
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.step import TrainStep, init_state

pytestmark = pytest.mark.slow

FILE = ROOT / "benchmarks" / "cost.py"
SPEC = importlib.util.spec_from_file_location("cost", FILE)
cost = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cost)


def test_arithmetic_of_every_stage():
    """Counted by a tracer of the reference's operations, in GFLOP."""
    config = ModelConfig()
    for work, expected in (
        (cost.encode_tile(config, FLOAT32), 725.9),
        (cost.prefill(config, FLOAT32, 1900), 1515),
        (cost.encode_image(config, FLOAT32), 1823),
        (cost.decode_masks(config, FLOAT32, 1), 3.66),
    ):
        assert work["float32"] / 1e9 == pytest.approx(expected, rel=1e-3)


def test_formats_follow_the_precision():
    config = ModelConfig()
    mixed = cost.encode_image(config, FAST)
    assert sum(mixed.values()) == cost.encode_image(config, FLOAT32)["float32"]
    assert set(mixed) == {"float32", "bfloat16"}
    assert set(cost.prefill(config, BFLOAT16, 281)) == {"bfloat16"}
    whole, split = cost.prefill(config, FLOAT32, 281)["float32"], cost.prefill(config, FLOAT32, 281, parts=2)
    assert split["bfloat16"] / 2 + split["float32"] == pytest.approx(whole)
    assert cost.cache_bytes(config, BFLOAT16, 1) == 12_288
    assert cost.cache_bytes(config, FLOAT32, 1) == 2 * 12_288


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
    step = TrainStep(graphdef, config, ids, Layout.over(jax.devices()[:1]))
    after, metrics = jax.eval_shape(step.whole, state, frozen, batch)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)

    counts = count_targets(batch, ids, config.loss)
    assert (counts.tokens, counts.masks) == (2 * worker.ANSWER_TOKENS, 2)
    assert batch["input_ids"].shape == (2, {"tiny": 80, "full": 300}[size])


@pytest.mark.parametrize("size", ("tiny", "micro"))
def test_torch_trains_as_many_numbers(size, monkeypatch):
    """The torch worker has no memory of SAM2; at full size it has the recipe of "micro"."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(FILE.parent))
    ours, theirs = importlib.import_module("train_jax"), importlib.import_module("train_torch")
    config = ours.training_config(size, "float32")
    trainable, _ = partition(structure(config)[1], config.freeze.trainable, config.freeze.frozen)
    language = config.model.language
    found = count(trainable, language.padded_vocab_size - language.vocab_size)
    memory = count({path: leaf for path, leaf in trainable.items() if matches(path, ours.MEMORY)})
    assert (memory > 0) == (size == "tiny")
    setup = {
        "config": to_dict(config.model),
        "derived": {"grid": config.model.sam2.grid, "stage_dims": config.model.sam2.hiera.stage_dims},
        "lora": to_dict(config.lora),
        "all_trains": config.freeze.trainable == ("*",),
    }
    model, _ = theirs.make_model(setup, "cpu")
    chosen = theirs.choose_trainable(model, setup)
    assert sum(parameter.numel() for parameter in chosen) == found - memory


def test_libraries_that_train_unequally_are_not_compared(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    spec = importlib.util.spec_from_file_location("benchmark_of_training", FILE.with_name("train.py"))
    train = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, train)  # its dataclasses look themselves up there
    spec.loader.exec_module(train)
    ours = {"trainable": 1_700, "trainable_memory": 300}
    train.require_same_size(ours, {"trainable": 1_400})
    with pytest.raises(SystemExit, match="1,400 parameters train in this library but 1,700 in torch"):
        train.require_same_size(ours, {"trainable": 1_700})
