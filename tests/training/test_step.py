import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import IDS, STEP, build, random_batch

from unibiomed_jax import sharding
from unibiomed_jax.training import forward
from unibiomed_jax.training.step import TrainStep, place, place_batch

STRATEGY = sharding.DATA_PARALLEL
NO_DROPOUT = dataclasses.replace(STEP, lora=dataclasses.replace(STEP.lora, dropout=0.0))


def build_step(config=STEP):
    mesh = sharding.make_mesh(jax.devices()[:1])
    graphdef, state, frozen = build(config)
    state, frozen = place((state, frozen), STRATEGY, mesh)
    step = TrainStep(graphdef, config, IDS, mesh, STRATEGY)

    def on_host(state, *batches):
        return step(state, frozen, [place_batch(batch, STRATEGY, mesh) for batch in batches])

    return on_host, state, frozen


@pytest.fixture(scope="module")
def default():
    step, state, frozen = build_step()
    return step, jax.device_get(state), frozen


def on_device(state):
    return jax.tree.map(jnp.array, state)


def test_the_loss_falls_on_a_batch_seen_again_and_again(default):
    step, state, _ = default
    state, batch = on_device(state), random_batch(0)
    losses = []
    for _ in range(15):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 15


def test_only_what_trains_has_optimiser_state_and_changes(default):
    step, state, frozen = default
    after, _ = step(on_device(state), random_batch(0))
    after, _ = step(after, random_batch(1))
    sizes = {path: value.size for path, value in state.trainable.items()}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.moments)) == 2 * sum(sizes.values()) + 1
    assert not any(path.startswith(("vision_model", "sam2.image_encoder", "sam2.memory")) for path in sizes)
    assert not set(sizes) & set(frozen)
    same = [path for path in sizes if np.array_equal(after.trainable[path], state.trainable[path])]
    assert not same


def test_the_same_state_and_batch_give_the_same_bits(default):
    step, state, _ = default
    first, _ = step(on_device(state), random_batch(0))
    second, _ = step(on_device(state), random_batch(0))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def test_a_batch_that_is_not_finite_is_not_applied(default):
    step, state, _ = default
    broken = random_batch(0)
    broken["pixel_values"] = np.full(broken["pixel_values"].shape, np.nan, np.float32)
    after, metrics = step(on_device(state), broken)
    assert not np.isfinite(metrics["loss"]) and int(metrics["bad_steps"]) == 1
    assert all(
        map(np.array_equal, jax.tree.leaves(after.trainable), jax.tree.leaves(state.trainable)),
    )
    assert all(map(np.array_equal, jax.tree.leaves(after.moments), jax.tree.leaves(state.moments)))
    after, metrics = step(after, broken)
    assert int(metrics["bad_steps"]) == 2
    after, metrics = step(after, random_batch(0))
    assert np.isfinite(metrics["loss"]) and int(metrics["bad_steps"]) == 0


def test_four_batches_of_one_are_one_batch_of_four(monkeypatch):
    """Samples differ in learned tokens and in objects, so that a mean of means would be another number."""
    lattice = np.stack(np.meshgrid(np.linspace(0.05, 0.95, 8), np.linspace(0.05, 0.95, 8)), -1)

    def fixed_points(logits, key, **_):
        return jnp.broadcast_to(jnp.asarray(lattice.reshape(64, 2), jnp.float32), (len(logits), 64, 2))

    monkeypatch.setattr(forward, "choose_points", fixed_points)
    batch = random_batch(3, size=4)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    step, state, _ = build_step(NO_DROPOUT)
    state = jax.device_get(state)
    together, metrics = step(on_device(state), batch)
    apart, metrics_apart = step(on_device(state), *rows)
    assert int(metrics["tokens"]) == int(metrics_apart["tokens"])
    for name in ("loss", "loss_tokens", "loss_mask", "loss_dice", "gradient_norm"):
        assert float(metrics[name]) == pytest.approx(float(metrics_apart[name]), rel=1e-6), name
    # The first moment of the first update is the clipped gradient times 1 - beta1.
    for a, b in zip(
        jax.tree.leaves(together.moments[1].mu), jax.tree.leaves(apart.moments[1].mu), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6 * 0.1)


def test_the_average_follows_the_parameters():
    config = dataclasses.replace(NO_DROPOUT, optim=dataclasses.replace(STEP.optim, ema=0.75))
    step, state, _ = build_step(config)
    start = jax.device_get(state.trainable)
    state, _ = step(state, random_batch(0))
    for path, value in state.average.items():
        np.testing.assert_allclose(value, 0.75 * start[path] + 0.25 * state.trainable[path], atol=1e-6)


def test_batches_without_masks_train_the_language_alone(default):
    step, state, _ = default
    batch = random_batch(0)
    batch["object_valid"] = np.zeros_like(batch["object_valid"])
    after, metrics = step(on_device(state), batch)
    assert float(metrics["loss_mask"]) == 0 and float(metrics["loss_dice"]) == 0
    assert float(metrics["loss"]) == float(metrics["loss_tokens"]) > 0


def test_dropout_and_points_change_from_step_to_step(default):
    step, state, _ = default
    state = on_device(dataclasses.replace(state, trainable={k: v + 0.01 for k, v in state.trainable.items()}))
    other = dataclasses.replace(on_device(state), step=jnp.int32(1))
    _, first = step(state, random_batch(0))
    _, second = step(other, random_batch(0))
    assert float(first["loss_tokens"]) != float(second["loss_tokens"])
    assert float(first["loss_mask"]) != float(second["loss_mask"])
