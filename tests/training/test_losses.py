import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unibiomed_jax.training.losses import (
    IGNORE,
    MASK_EPS,
    choose_points,
    cyclic_copies,
    mask_losses,
    sample_bilinear,
    token_cross_entropy,
)


def test_sample_bilinear_gives_the_reference_values():
    ramp = jnp.arange(16.0).reshape(1, 4, 4)
    points = jnp.array([[[0, 0], [0.125, 0.125], [0.5, 0.5], [1, 1], [0.9, 0.1]]])
    np.testing.assert_allclose(sample_bilinear(ramp, points)[0], [0, 0, 7.5, 3.75, 2.43], atol=1e-6)


def test_mask_losses_give_the_reference_values():
    logits = jnp.tile(jnp.array([2, -1, 0.5, -3.0]), (5, 1))
    targets = jnp.tile(jnp.array([1, 0, 0.25, 0]), (5, 1))
    sums = mask_losses(logits, targets, jnp.ones(5, bool))
    assert float(2.0 * sums.cross_entropy / (20 + MASK_EPS)) == pytest.approx(0.6689237, abs=2e-7)
    assert float(0.5 * sums.dice / (5 + MASK_EPS)) == pytest.approx(0.1224658, abs=2e-7)


def test_an_invalid_mask_changes_nothing():
    logits, targets = jax.random.normal(jax.random.key(0), (2, 3, 64))
    targets = jax.nn.sigmoid(targets)
    valid = jnp.array([True, False, True])
    kept = mask_losses(logits[valid], targets[valid], jnp.ones(2, bool))
    for a, b in zip(mask_losses(logits, targets, valid), kept, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    gradient = jax.grad(lambda x: sum(mask_losses(x, targets, valid)))(logits)
    assert not gradient[1].any() and gradient[0].any()


def naive_cross_entropy(hidden, head, labels, vocab_size):
    logits = (hidden @ head)[:, :-1, :vocab_size]
    log_probability = jax.nn.log_softmax(logits)
    targets = labels[:, 1:]
    learned = targets != IGNORE
    chosen = jnp.take_along_axis(log_probability, jnp.where(learned, targets, 0)[..., None], -1)[..., 0]
    correct = learned & (logits.argmax(-1) == targets)
    return -jnp.where(learned, chosen, 0).sum(1), correct.sum(1)


def test_the_head_is_not_kept_for_every_chunk():
    def total(hidden, head):
        labels = jnp.zeros((2, 35), jnp.int32)
        return token_cross_entropy(hidden, head, labels, vocab_size=13, chunk=5)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(jnp.ones((2, 35, 8)), jnp.ones((8, 16))))
    assert "f32[8,16]" in program and "f32[7,2,5,8]" in program
    assert "[7,8,16]" not in program and "[7,2,5,16]" not in program


def test_chunks_without_learned_tokens_are_left_out_of_both_passes():
    """Both are loops whose length the labels decide: no gradient of the head is made for an empty chunk."""

    def total(hidden, head, labels):
        return token_cross_entropy(hidden, head, labels, vocab_size=13, chunk=5)[0].sum()

    shapes = jnp.ones((2, 35, 8)), jnp.ones((8, 16)), jnp.zeros((2, 35), jnp.int32)
    program = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(*shapes))
    assert program.count("while[") == 2 and "scan[" not in program and "cond[" not in program


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_token_cross_entropy_in_chunks_equals_all_logits_at_once(chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 17, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    labels = np.where(rng.random((3, 17)) < 0.4, rng.integers(0, 13, (3, 17)), IGNORE)
    labels[1] = IGNORE  # a row without any answer
    labels[2, -1] = 5

    def total(function):
        return lambda hidden, head: function(hidden, head)[0].sum()

    def chunked(hidden, head):
        return token_cross_entropy(hidden, head, jnp.asarray(labels), vocab_size=13, chunk=chunk)

    def naive(hidden, head):
        return naive_cross_entropy(hidden, head, jnp.asarray(labels), 13)

    np.testing.assert_allclose(chunked(hidden, head)[0], naive(hidden, head)[0], rtol=1e-5)
    np.testing.assert_array_equal(chunked(hidden, head)[1], naive(hidden, head)[1])
    for a, b in zip(
        jax.grad(total(chunked), (0, 1))(hidden, head),
        jax.grad(total(naive), (0, 1))(hidden, head),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert not jax.grad(total(chunked), 1)(hidden, head)[:, 13:].any()


def test_no_array_of_all_logits_exists():
    """Compiled memory stays far below tokens x vocabulary."""
    tokens, vocab = 2048, 8192
    args = (
        jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, vocab), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )

    def loss(hidden, head, labels):
        return token_cross_entropy(hidden, head, labels, vocab_size=vocab, chunk=64).cross_entropy.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 4


def test_chosen_points_crowd_where_the_prediction_is_unsure():
    columns = jnp.linspace(-8, 8, 32)
    logits = jnp.broadcast_to(columns, (2, 32, 32))  # unsure in the middle columns, and outside the map
    points = choose_points(logits, jax.random.key(1), num_points=400)
    assert points.shape == (2, 400, 2)
    assert ((points >= 0) & (points < 1)).all()
    unsure = jnp.abs(sample_bilinear(logits, points))
    assert float(unsure[:, :300].max()) < 2.5  # the 300 least sure of 1200 uniform candidates
    assert float(unsure[:, 300:].max()) > 6
    assert not jnp.array_equal(points[0], points[1])


def test_no_gradient_flows_through_the_choice_of_points():
    logits = jax.random.normal(jax.random.key(0), (1, 8, 8))
    gradient = jax.grad(lambda x: choose_points(x, jax.random.key(1), num_points=16).sum())(logits)
    assert not gradient.any()


def test_cyclic_copies_repeat_the_objects_of_a_sample():
    objects = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
    index, valid = cyclic_copies(objects, 5, jax.random.key(0))
    np.testing.assert_array_equal(
        index[np.array([0, 1, 3])], [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 2, 0, 1]]
    )
    np.testing.assert_array_equal(valid.all(1), [True, True, False, True])


def test_of_more_objects_than_copies_a_random_choice_is_taken():
    objects = jnp.arange(8) < jnp.array([7, 5, 3])[:, None]
    draws = []
    for seed in range(40):
        index, valid = cyclic_copies(objects, 5, jax.random.key(seed))
        assert valid.all()
        np.testing.assert_array_equal(index[1:], [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]])
        draws.append(index[0].tolist())
    assert all(len(set(draw)) == 5 for draw in draws)
    assert {slot for draw in draws for slot in draw} == set(range(7))
    assert cyclic_copies(objects, 5, jax.random.key(3))[0][0].tolist() == draws[3]
