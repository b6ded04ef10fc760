"""Where answers end, how tokens are drawn, and words as they come."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import MICRO

from unibiomed_jax import InputError, Request, UniBiomed
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.inference.answer import Sampling
from unibiomed_jax.inference.generate import Draw, _choose, likeliest

pytestmark = pytest.mark.slow

QUESTION = "<image>Please segment the liver."


@pytest.fixture(scope="module")
def model():
    return UniBiomed.from_pretrained(MICRO, precision=FLOAT32)


@pytest.fixture(scope="module")
def image(model):
    return model.open(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def dictated(model, image, text, question=QUESTION):
    """A request whose answer is `text`."""
    return Request(question, image, forced=dict(enumerate(model.tokenizer.encode(text))))


# --- a batch equals one by one ---


def same(one, other):
    assert one.text == other.text and len(one.segments) == len(other.segments)
    for a, b in zip(one.segments, other.segments, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)


def test_a_long_prompt_does_not_shorten_the_answers_beside_it(model, image, monkeypatch):
    length = len(model.prompt_of(Request(QUESTION, image)).ids)
    context = length + 100
    language = dataclasses.replace(model.config.language, max_position_embeddings=context)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, language=language))
    long = QUESTION + "x" * (context - length - 4)  # one token a byte: four tokens of room
    answer = "The <p> liver </p> [SEG] and the <p> spleen </p> [SEG] are seen.<|end|>"
    requests = [dictated(model, image, answer), dictated(model, image, answer, long)]
    together = model.predict_batch(requests, max_new_tokens=80)
    alone = [model.predict_batch([request], max_new_tokens=80)[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        same(one, other)
    assert together[0].text == answer and len(together[0].segments) == 2
    assert len(model.tokenizer.encode(together[1].text)) <= 4


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_lengths_answers_as_one_by_one(model, image, seed):
    rng = np.random.default_rng(seed)
    said = ["[SEG] a.<|end|>", "<|end|>", "no mask at all.<|end|>", "[SEG][SEG] b", "<p>x</p> [SEG]<|end|>"]
    requests = [
        dictated(model, image, said[rng.integers(len(said))], QUESTION + "?" * int(rng.integers(0, 90)))
        for _ in range(int(rng.integers(2, 6)))
    ]
    for answer, request in zip(model.predict_batch(requests, max_new_tokens=24), requests, strict=True):
        same(answer, model.predict_batch([request], max_new_tokens=24)[0])


# --- a stop after so many masks ---


@pytest.mark.parametrize("masks", [1, 2, 3])
def test_an_answer_stops_after_its_masks(model, image, masks):
    request = dictated(model, image, "<p> a </p> [SEG], <p> b </p> [SEG], c [SEG].<|end|>")
    whole = model.predict_batch([request], max_new_tokens=60)[0]
    assert len(whole.segments) == 3
    for ask in (model.predict_batch, model.ground):
        (answer,) = ask([request], max_new_tokens=60, max_masks=masks)
        assert len(answer.segments) == masks and whole.text.startswith(answer.text)
        # One token more than the [SEG]: the one that its state chose.
        behind = answer.text.rpartition("[SEG]")[2]
        assert len(model.tokenizer.encode(behind)) <= 1
        for found, expected in zip(answer.segments, whole.segments, strict=False):
            np.testing.assert_array_equal(found.mask, expected.mask)
            assert found.phrase == expected.phrase


def test_limits_that_allow_nothing_are_refused(model, image):
    for limits, reason in (
        ({"max_masks": 0}, "max_masks is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ):
        with pytest.raises(InputError, match=reason):
            model.predict(image, QUESTION, **limits)


# --- drawing ---


def test_the_same_seed_draws_the_same_words_and_another_one_others(model, image):
    def said(seed, temperature=1.0, top_p=1.0):
        return model.predict(
            image, QUESTION, max_new_tokens=12, sampling=Sampling(temperature, top_p, seed)
        ).text

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(6)}) > 3
    greedy = model.predict(image, QUESTION, max_new_tokens=12).text
    # What is left of the likeliest alone is the likeliest.
    assert said(1, top_p=1e-6) == said(2, temperature=1e-5) == greedy
    # Also of numbers that float32 does not know.
    assert said(1, top_p=1e-46) == said(2, temperature=1e-38) == said(3, temperature=1e-60) == greedy


def test_limits_beyond_any_answer_are_no_limits(model, image):
    expected = model.predict(image, QUESTION, max_new_tokens=12)
    asked = dictated(model, image, expected.text + "<|end|>")
    for limits in ({"max_new_tokens": 10**18}, {"max_masks": 10**18}):
        (answer,) = model.predict_batch([asked], **{"max_new_tokens": 80, **limits})
        assert answer.text.startswith(expected.text)


def test_a_draw_does_not_depend_on_the_batch_or_on_the_way(model, image):
    sampling = Sampling(1.5, 0.9, 7)
    other = Request("<image>Is there anything else in this picture?", image)
    asked = Request(QUESTION, image)
    alone = model.predict_batch([asked], max_new_tokens=12, sampling=sampling)[0]
    beside = model.predict_batch([other, asked], max_new_tokens=12, sampling=sampling)[1]
    whole = model.ground([asked], max_new_tokens=12, sampling=sampling)[0]
    assert alone.text == beside.text == whole.text


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, None, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.8, [0.625, 0.375, 0, 0]),
        (0.5, None, [0.6849, 0.2466, 0.0616, 0.0068]),  # the squares, normalised
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p, expected):
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

    def token(seed):
        return _choose(logits, jnp.array([-1]), 0, Draw(jnp.float32(temperature), top_p, seed))[0]

    draws = jax.vmap(token)(jnp.arange(20_000, dtype=jnp.uint32))
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 20_000, expected, atol=0.02)


# Whole numbers, so that unequal ones stay so in float32: equally likely tokens are kept together.
@given(
    weights=st.lists(st.integers(1, 1000), min_size=12, max_size=12, unique=True), top_p=st.floats(0.01, 1.0)
)
def test_the_likeliest_are_the_fewest_that_have_the_share(weights, top_p):
    probability = np.array(weights) / np.sum(weights)
    kept = np.isfinite(np.asarray(likeliest(jnp.log(probability)[None], jnp.float32(top_p)))[0])
    assert kept.any() and probability[kept].min() >= probability[~kept].max(initial=0)
    assert probability[kept].sum() >= top_p - 1e-5
    assert probability[kept].sum() - probability[kept].min() < top_p + 1e-5


def test_a_share_of_one_leaves_nothing_out():
    logits = jax.random.normal(jax.random.key(0), (1, 150_000)) * 8
    assert np.isfinite(np.asarray(likeliest(logits, jnp.float32(1)))).all()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_impossible_draws_are_refused(settings):
    (name,) = settings
    with pytest.raises(InputError, match=f"{name}=.* is impossible; give"):
        Sampling(**settings)


# --- words as they come ---


def test_the_pieces_are_the_answer(model, image):
    pieces = list(model.stream(image, QUESTION, max_new_tokens=20))
    assert "".join(pieces[:-1]).strip() == pieces[-1].text
    assert len(pieces) > 2 and all(pieces[:-1])
    same(pieces[-1], model.predict(image, QUESTION, max_new_tokens=20))


def test_no_piece_ends_in_half_a_character(model, image, monkeypatch):
    """Of a tokenizer of bytes every letter beyond ASCII is several tokens."""
    text = "äöü€😀" * 6 + "<|end|>"
    ids = model.tokenizer.encode(text)
    start = model._start

    def forced(requests, *settings):
        return start([Request(r.prompt, r.image, forced=dict(enumerate(ids))) for r in requests], *settings)

    monkeypatch.setattr(model, "_start", forced)
    *pieces, answer = model.stream(image, QUESTION, max_new_tokens=200)
    assert answer.text == text == "".join(pieces) and not any("\ufffd" in piece for piece in pieces)


def test_a_batch_that_waits_for_its_masks_holds_no_cache(model, image, monkeypatch):
    """Several wait at a time, and a cache is the most that a batch holds."""
    finish, held = model._finish, []

    def watched(answering, hide_absent):
        held.append(answering.state.cache)
        return finish(answering, hide_absent)

    monkeypatch.setattr(model, "_finish", watched)
    model.predict_batch([Request("<image>\nWhat is it?", image)], max_new_tokens=2)
    assert held == [None]
