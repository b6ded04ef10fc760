"""Means and their intervals, by hand and by what must hold for any scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unibiomed_jax.evaluation.bootstrap import Case, estimate, estimate_difference


def case(dataset, target, patient, **scores):
    return Case(dataset, target, str(patient), scores)


def find(estimates, dataset=None, target=None, score="dice"):
    (found,) = [e for e in estimates if (e.score, e.dataset, e.target) == (score, dataset, target)]
    return found


CASES = [
    case("a", "liver", 1, dice=0.2),
    case("a", "liver", 1, dice=0.4),
    case("a", "liver", 2, dice=0.9),
    case("a", "spleen", 2, dice=1.0),
    case("b", "liver", 1, dice=0.0, hd95_mm=7.0),
]


def test_means_over_cases_then_targets_then_datasets():
    found = estimate(CASES)
    liver, spleen = 0.5, 1.0
    assert find(found, "a", "liver").value == pytest.approx(liver)
    assert find(found, "a").value == pytest.approx((liver + spleen) / 2)
    assert find(found).value == pytest.approx(((liver + spleen) / 2 + 0.0) / 2)
    assert find(found).micro == pytest.approx((0.2 + 0.4 + 0.9 + 1.0) / 5)
    assert (find(found).cases, find(found).patients) == (5, 3)
    assert (find(found, "a", "liver").cases, find(found, "a", "liver").patients) == (3, 2)
    assert (find(found, score="hd95_mm").value, find(found, score="hd95_mm").cases) == (7.0, 1)
    assert {e.interval for e in found} == {None}  # too few patients
    assert found[0].dataset is found[0].target is None


def normal(number, images=1, seed=3):
    values = np.random.default_rng(seed).normal(0.7, 0.1, number)
    return [case("a", "liver", n, dice=value) for n, value in enumerate(values) for _ in range(images)]


def test_intervals_are_those_of_the_theory():
    cases = normal(400)
    found = find(estimate(cases))
    values = [c.scores["dice"] for c in cases]
    half = 1.96 * np.std(values) / np.sqrt(len(values))
    low, high = found.interval
    assert low == pytest.approx(np.mean(values) - half, abs=0.1 * half)
    assert high == pytest.approx(np.mean(values) + half, abs=0.1 * half)


def test_patients_are_drawn_and_not_their_images():
    once, often = find(estimate(normal(30))), find(estimate(normal(30, images=9)))
    assert often.interval == pytest.approx(once.interval)
    assert (often.cases, often.patients) == (270, 30)


def test_four_patients_have_no_interval_and_five_have():
    assert find(estimate(normal(4))).interval is None
    low, high = find(estimate(normal(5))).interval
    assert low < high


scores = st.floats(0, 1, width=16)
some_cases = st.lists(
    st.builds(
        lambda d, t, p, s: Case(d, t, p, {"dice": s}),
        st.sampled_from("ab"),
        st.sampled_from("xyz"),
        st.sampled_from("12345678"),
        scores,
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(some_cases, st.randoms())
def test_the_order_of_cases_does_not_matter(cases, random):
    shuffled = list(cases)
    random.shuffle(shuffled)
    for one, other in zip(estimate(cases), estimate(shuffled), strict=True):
        assert one.value == pytest.approx(other.value)
        assert one.interval == (None if other.interval is None else pytest.approx(other.interval))


@settings(max_examples=25, deadline=None)
@given(some_cases)
def test_estimates_lie_among_the_scores(cases):
    values = [c.scores["dice"] for c in cases]
    for found in estimate(cases):
        for value in (found.value, found.micro, *(found.interval or ()), *(found.micro_interval or ())):
            assert min(values) - 1e-12 <= value <= max(values) + 1e-12


@settings(max_examples=25, deadline=None)
@given(some_cases, st.floats(-0.5, 0.5, width=16))
def test_a_constant_difference_is_certain(cases, shift):
    """Apart, the systems would seem to overlap: what they share is drawn alike."""
    moved = [Case(c.dataset, c.target, c.patient, {"dice": c.scores["dice"] + shift}) for c in cases]
    for first, second, found in estimate_difference(cases, moved):
        assert second.value - first.value == pytest.approx(found.value)
        assert found.value == pytest.approx(shift, abs=1e-12)
        if found.interval:
            assert found.interval == pytest.approx((shift, shift), abs=1e-12)


def test_scores_that_one_system_lacks_are_not_compared():
    first = [case("a", "x", 1, dice=0.5, hd95_mm=3.0), case("a", "x", 2, dice=0.5)]
    second = [case("a", "x", 1, dice=0.7), case("a", "x", 2, dice=0.5, hd95_mm=1.0)]
    found = [difference for _, _, difference in estimate_difference(first, second)]
    assert {e.score for e in found} == {"dice"} and find(found).value == pytest.approx(0.1)
