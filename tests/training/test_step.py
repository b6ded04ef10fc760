import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import IDS, STEP, build, random_batch

from unibiomed_jax.config.precision import BFLOAT16
from unibiomed_jax.data.pipeline import PipelineConfig, collate
from unibiomed_jax.data.plan import Shape
from unibiomed_jax.data.transforms import SampleSizes
from unibiomed_jax.parameters import split
from unibiomed_jax.sharding.layout import Layout
from unibiomed_jax.training import forward
from unibiomed_jax.training import step as step_module
from unibiomed_jax.training.ahead import compile_ahead
from unibiomed_jax.training.config import FreezeConfig, RematConfig
from unibiomed_jax.training.forward import LossCounts, empty_sums
from unibiomed_jax.training.initialise import structure
from unibiomed_jax.training.start import starting_parameters
from unibiomed_jax.training.step import TrainStep, gradients, init_state

pytestmark = pytest.mark.slow

LAYOUT = Layout.over(jax.devices()[:1])
CONFIG = dataclasses.replace(
    STEP,
    lora=dataclasses.replace(STEP.lora, dropout=0.0),
    optim=dataclasses.replace(STEP.optim, ema=0.75),
)
LATTICE = np.stack(np.meshgrid(np.linspace(0.05, 0.95, 8), np.linspace(0.05, 0.95, 8)), -1)


def fixed_points(logits, key, **_):
    return jnp.broadcast_to(jnp.asarray(LATTICE.reshape(64, 2), jnp.float32), (len(logits), 64, 2))


@pytest.fixture(scope="module")
def built():
    """The compiled step and its start, without anything random, so that batches can be compared."""
    graphdef, state, frozen = build(CONFIG)
    state, frozen = jax.device_get(state), LAYOUT.place(frozen)
    compiled = TrainStep(graphdef, CONFIG, IDS, LAYOUT)

    def step(state, *batches):
        return compiled(state, frozen, [LAYOUT.place_batch(batch) for batch in batches])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "choose_points", fixed_points)
        yield step, state, frozen


def on_device(state):
    """A copy that a step may use up."""
    return LAYOUT.place(jax.tree.map(jnp.array, state))


def test_the_loss_falls_on_a_batch_seen_again_and_again(built):
    step, state, _ = built
    state, batch = on_device(state), random_batch(0)
    losses = []
    for _ in range(15):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 15


def test_the_old_state_is_given_up(built):
    step, state, _ = built
    old = on_device(state)
    step(old, random_batch(0))
    leaves = jax.tree.leaves((old.trainable, old.moments, old.average))
    assert all(leaf.is_deleted() for leaf in leaves)


def update_of(config, state, frozen):
    """State and metrics after one update under another configuration of the same model."""
    step = TrainStep(structure(config)[0], config, IDS, LAYOUT)
    return step(on_device(state), frozen, [LAYOUT.place_batch(random_batch(0))])


def test_what_is_computed_again_gives_the_same_gradients(built):
    step, state, frozen = built
    kept, expected = step(on_device(state), random_batch(0))
    again, metrics = update_of(dataclasses.replace(CONFIG, remat=RematConfig(language="dots")), state, frozen)
    # The first moment is of a clipped gradient, so its norm is compared as well.
    assert float(metrics["gradient_norm"]) == pytest.approx(float(expected["gradient_norm"]), rel=1e-5)
    for path, moment in again.moments[1].mu.items():
        np.testing.assert_allclose(moment, kept.moments[1].mu[path], atol=1e-6 * 0.1, err_msg=path)


def test_bfloat16_computes_near_float32_and_keeps_float32_masters(built):
    step, state, _ = built
    config = dataclasses.replace(CONFIG, precision=BFLOAT16)
    trainable, frozen = starting_parameters(config, LAYOUT)
    assert {value.dtype for value in trainable.values()} == {jnp.dtype("float32")}
    assert {value.dtype for value in frozen.values()} == {jnp.dtype("bfloat16")}

    after, metrics = update_of(config, init_state(trainable, config), frozen)
    masters = jax.tree.leaves((after.trainable, after.moments[1].mu, after.moments[1].nu, after.average))
    assert {value.dtype for value in masters} == {jnp.dtype("float32")}
    _, expected = step(on_device(state), random_batch(0))
    for name in ("loss", "loss_tokens", "loss_mask", "loss_dice"):
        # A rounding to 8 bits is wrong by 2^-9 at most; in means over tokens and points many of them cancel.
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=2**-9), name
    assert float(metrics["loss"]) != float(expected["loss"])


def test_following_an_object_teaches_the_memory():
    """The second frame is segmented from the memory of the first only where objects are followed."""
    sam2 = dataclasses.replace(CONFIG.model.sam2, max_conditioning_frames=1)
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, sam2=sam2),
        freeze=FreezeConfig(trainable=("sam2.memory_*",), frozen=()),
    )
    graphdef, state, frozen = build(config)
    batch = {name: jnp.asarray(array) for name, array in random_batch(0, size=1, frames=2).items()}
    counts = forward.count_targets(batch, IDS, config.loss)

    def taught(follow):
        changed = dataclasses.replace(config, loss=dataclasses.replace(config.loss, follow=follow))
        find = jax.jit(lambda state: gradients(graphdef, changed, IDS, state, frozen, batch, counts, 0)[0])
        return {path for path, gradient in find(state).items() if np.any(gradient)}

    assert taught(True) == set(state.trainable)
    assert taught(False) == set()


def test_masks_are_not_learned_before_their_update(built):
    _, state, frozen = built
    config = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, masks_from=1))
    batch = {name: jnp.asarray(array) for name, array in random_batch(0).items()}
    counts = forward.count_targets(batch, IDS, config.loss)
    find = jax.jit(
        lambda state: gradients(structure(config)[0], config, IDS, state, frozen, batch, counts, 0)[0]
    )
    for step, learned in ((0, False), (1, True)):
        found = find(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)))
        assert np.any(found["language_model.embed_tokens"])
        for path in ("text_hidden_fcs.linear1.kernel", "sam2.sam_mask_decoder.upscale_conv1.kernel"):
            assert np.any(found[path]) == learned, (step, path)


def test_only_what_trains_has_optimiser_state_and_changes(built):
    step, state, frozen = built
    after, _ = step(on_device(state), random_batch(0))
    after, _ = step(after, random_batch(1))
    sizes = {path: value.size for path, value in state.trainable.items()}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.moments)) == 2 * sum(sizes.values()) + 1
    assert not any(path.startswith(("vision_model", "sam2.image_encoder", "sam2.memory")) for path in sizes)
    assert not set(sizes) & set(frozen)
    same = [path for path in sizes if np.array_equal(after.trainable[path], state.trainable[path])]
    assert not same


def test_the_same_state_and_batch_give_the_same_bits(built):
    step, state, _ = built
    first, _ = step(on_device(state), random_batch(0))
    second, _ = step(on_device(state), random_batch(0))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def test_a_batch_that_is_not_finite_is_not_applied(built):
    step, state, _ = built
    broken = random_batch(0)
    broken["pixel_values"] = np.full(broken["pixel_values"].shape, np.nan, np.float32)
    after, metrics = step(on_device(state), broken)
    assert not np.isfinite(metrics["loss"]) and int(metrics["bad_steps"]) == 1
    for part in ("trainable", "moments", "average"):
        leaves = jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(state, part))
        assert all(map(np.array_equal, *leaves)), part
    after, metrics = step(after, broken)
    assert int(metrics["bad_steps"]) == 2
    after, metrics = step(after, random_batch(0))
    assert np.isfinite(metrics["loss"]) and int(metrics["bad_steps"]) == 0


def test_four_batches_of_one_are_one_batch_of_four(built):
    """Samples differ in learned tokens and in objects, so that a mean of means would be another number."""
    batch = random_batch(3, size=4)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    step, state, _ = built
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


def test_the_average_follows_the_parameters(built):
    step, start, _ = built
    state, _ = step(on_device(start), random_batch(0))
    for path, value in state.average.items():
        expected = 0.75 * start.trainable[path] + 0.25 * state.trainable[path]
        np.testing.assert_allclose(value, expected, atol=1e-6)


def test_batches_without_masks_train_the_language_alone(built):
    step, state, _ = built
    batch = random_batch(0)
    batch["object_valid"] = np.zeros_like(batch["object_valid"])
    after, metrics = step(on_device(state), batch)
    assert float(metrics["loss_mask"]) == 0 and float(metrics["loss_dice"]) == 0
    assert float(metrics["loss"]) == float(metrics["loss_tokens"]) > 0


def test_dropout_and_points_are_new_for_every_update_and_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(step_module, "answer_batch", lambda *_, dropout_key, **__: seen.append(dropout_key))
    monkeypatch.setattr(
        step_module, "loss_sums", lambda *arguments: seen.append(arguments[-1]) or empty_sums()
    )
    graphdef, trainable = split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))

    def keys(update, index):
        state = dataclasses.replace(init_state(trainable, STEP), step=jnp.int32(update))
        gradients(graphdef, STEP, IDS, state, {}, {}, LossCounts(1, 1), index)
        return [jax.random.key_data(seen.pop()).tolist() for _ in range(2)]

    assert keys(0, 0) == keys(0, 0)
    drawn = [key for update in range(2) for index in range(2) for key in keys(update, index)]
    assert len(set(map(tuple, drawn))) == 8


@pytest.mark.scale
@pytest.mark.parametrize(
    ("accumulate", "programs"),
    [
        (1, {"jit(whole)"}),
        (2, {"jit(<lambda>)", "jit(nothing)", "jit(accumulate)", "jit(finish)"}),
    ],
)
def test_nothing_compiles_that_was_compiled_ahead(accumulate, programs):
    shape, optim = Shape(0, 0, 1, 8), dataclasses.replace(CONFIG.optim, accumulate=accumulate)
    config = dataclasses.replace(CONFIG, data=PipelineConfig((), batch_size=2), optim=optim)
    graphdef, state, frozen = build(config)
    state, frozen = LAYOUT.place(state), LAYOUT.place(frozen)
    step = TrainStep(graphdef, config, IDS, LAYOUT)
    compiled = []

    def listen(event, _, fun_name="", **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compile_ahead(config, LAYOUT, step, state, frozen, [shape])
        assert set(compiled) == programs
        compiled.clear()
        blank = LAYOUT.place_batch(collate([None] * 2, shape, SampleSizes.of(config.model)))
        step(state, frozen, [blank] * accumulate)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not programs & set(compiled)
