import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unibiomed_jax.training import step
from unibiomed_jax.training.config import OptimConfig, TrainConfig
from unibiomed_jax.training.forward import LossCounts, LossSums
from unibiomed_jax.training.optimizer import adamw, learning_rate

# Ten epochs of 1000 batches; the values are those of the reference's schedulers.
EPOCHS = OptimConfig(lr=4e-5, steps=10_000, accumulate=1)


@pytest.mark.parametrize(
    "batch, expected",
    [
        (0, 4.0e-10),
        (1, 8.05595e-8),
        (499, 4.0e-5),
        (500, 4.0e-5),
        (5000, 2.165158690944681e-5),
        (9999, 1.0936e-12),
    ],
)
def test_learning_rate_is_the_reference_schedule(batch, expected):
    assert float(learning_rate(EPOCHS, batch)) == pytest.approx(expected, rel=1e-5)


def test_an_update_uses_the_rate_of_its_last_batch():
    accumulated = dataclasses.replace(EPOCHS, steps=2500, accumulate=4)
    for update in (0, 1, 100, 1249, 2499):
        assert learning_rate(accumulated, update) == learning_rate(EPOCHS, 4 * update + 3)


def test_adamw_clips_and_decays_by_hand():
    config = OptimConfig(weight_decay=0.1, clip=1.0)
    parameters = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
    optimizer = adamw(config)
    state = optimizer.init(parameters)
    m = {k: np.zeros_like(v) for k, v in parameters.items()}
    v = {k: np.zeros_like(x) for k, x in parameters.items()}
    for t in range(1, 4):
        gradients = {"a": jnp.array([3.0 * t, 4.0]), "b": jnp.array([0.1])}
        direction, state = optimizer.update(gradients, state, parameters)
        norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        for k, g in gradients.items():
            g = np.asarray(g) / max(norm, 1.0)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g * g
            expected = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            expected = expected + 0.1 * np.asarray(parameters[k])
            np.testing.assert_allclose(direction[k], expected, rtol=2e-5)
        parameters = optax.apply_updates(parameters, {k: -0.01 * d for k, d in direction.items()})


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_direction_that_is_not_finite_is_not_applied(eps):
    """Without eps, a gradient of zero gives 0 / 0, though loss and norm are finite."""
    config = TrainConfig(optim=OptimConfig(lr=1.0, warmup=0.0, eps=eps, ema=0.5))
    start = step.init_state({"a": jnp.array([1.0, 2.0])}, config)
    sums = LossSums(jnp.float32(1), jnp.float32(0), jnp.float32(0))
    state, metrics = step.update(config, start, {"a": jnp.array([0.0, 1.0])}, sums, LossCounts(1, 1))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    assert int(metrics["bad_steps"]) == (eps == 0)
    for part in ("trainable", "average", "moments"):
        same = jax.tree.map(np.array_equal, getattr(state, part), getattr(start, part))
        assert all(jax.tree.leaves(same)) == (eps == 0)
