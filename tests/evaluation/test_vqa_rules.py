"""Rules for answers, compared with what the code that publishes numbers by them gave (tests/files)."""

import json

import pytest
from places import FILES

from unibiomed_jax.evaluation.java import Java
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.evaluation.scoring import rows, score_strict
from unibiomed_jax.evaluation.text import NO_METEOR
from unibiomed_jax.evaluation.vqa_rules import RULES, choose, normalise, score_answer

GOLDEN = json.loads((FILES / "vqa_scores.json").read_text())
ITEMS = GOLDEN["items"]


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    monkeypatch.setattr(Java, "find", classmethod(lambda cls: None))


@pytest.mark.parametrize("item", ITEMS, ids=[f"{item['truth']}|{item['answer']}" for item in ITEMS])
def test_as_medplib_and_medevalkit_score(item):
    truth, said = item["truth"], item["answer"]
    assert normalise(truth) == item["normalised_truth"] and normalise(said) == item["normalised_answer"]
    expected = item["medplib"]
    assert RULES["medplib"](truth, said, True) == {"closed_accuracy": expected["closed_equal"]}
    scores = RULES["medplib"](truth, said, False)
    assert scores.pop("open_accuracy") == pytest.approx(expected["exactmatch"], abs=1e-12)
    assert scores == pytest.approx({name: expected[name] for name in scores}, abs=1e-12)

    expected = item["medevalkit"]
    right = expected["judgement" if truth.lower() in ("yes", "no") else "close_end"]
    assert RULES["medevalkit"](truth, said, True) == {"closed_accuracy": right}
    scores = RULES["medevalkit"](truth, said, False)
    f1, precision, recall = expected["f1_precision_recall"] or (0, 0, 0)  # 0 alone for an empty answer
    assert [scores[name] for name in ("f1", "precision", "recall")] == pytest.approx(
        [f1, precision, recall], abs=1e-12
    )


def test_medplibs_table():
    """Its means over all of them, in percent."""
    expected = dict(GOLDEN["medplib_cal_metric"])
    by_type = {
        kind: [RULES["medplib"](item["truth"], item["answer"], kind == "closed") for item in ITEMS
               if item["answer_type"] == kind]
        for kind in ("closed", "open")
    }  # fmt: skip

    def mean(kind, name):
        return 100 * sum(scores[name] for scores in by_type[kind]) / len(by_type[kind])

    assert mean("closed", "closed_accuracy") == pytest.approx(expected["yes/no accuracy"])
    assert mean("open", "open_accuracy") == pytest.approx(expected["exact match acc score"])
    for name, theirs in (("f1", "f1 score"), ("precision", "precision"), ("recall", "recall")):
        assert mean("open", name) == pytest.approx(expected[theirs])


def test_llava_med_leaves_out_what_contradicts():
    assert RULES["llava-med"]("yes", "Yes, there is.", True) == {"closed_accuracy": 1}
    assert RULES["llava-med"]("yes", "No.", True) == {}
    assert RULES["llava-med"]("yes", "a nodule", True) == {}  # no is in it
    assert RULES["llava-med"]("left", "left", True) == {"closed_accuracy": 0}
    assert RULES["llava-med"]("right lung", "lung", False)["recall"] == 0.5


@pytest.mark.parametrize(
    ("truth", "said", "right"),
    [("X-Ray", "x ray.", True), ("Yes", "yep", True), ("有", "是的。", True), ("Liver (left)", "liver", True),
     ("Liver", "the liver", False), ("否", "有", False)],
)  # fmt: skip
def test_lmms_eval(truth, said, right):
    assert RULES["lmms-eval"](truth, said, True) == {"closed_accuracy": right}
    assert RULES["lmms-eval"](truth, said, False) == {"open_accuracy": right}


@pytest.mark.parametrize(
    ("said", "meant"),
    [("B", "MRI."), ("b. MRI", "MRI."), ("The answer is A", "CT"), ("mri", "MRI."),
     ("It is an ultrasound scan", "Ultrasound"), ("(b)", "MRI."), ("(B) CT", "MRI."),
     ("Option C", "Ultrasound"), ("The answer is (c).", "Ultrasound"), ("a mri scan", "MRI."),
     ("The correct option is (B).", "MRI."), ("", ""), (" .", "")],
)  # fmt: skip
def test_choices(said, meant):
    """By letter, by text, or the most similar one; of no words none."""
    assert choose(said, ("CT", "MRI.", "Ultrasound")) == meant


@pytest.mark.parametrize(("said", "meant"), [("C. difficile", "C. difficile"), ("C.", "S. aureus")])
def test_a_choice_said_in_full_is_no_letter(said, meant):
    assert choose(said, ("E. coli", "B. cereus", "S. aureus", "C. difficile")) == meant


def test_rates_by_modality_with_intervals():
    """Closed and open questions of six patients in two modalities."""
    said = ["the liver", "yes.", "the liver", "no"]
    samples = [
        Sample("vqa", str(n), "<image>\n?", answer="Yes" if n % 2 else "liver", patient=f"p{n // 4}",
               prediction=said[n % 4], dataset="set", image=str(n),
               groups={"answer_type": "closed" if n % 2 else "open", "modality": "CT" if n < 12 else "MR"})
        for n in range(24)
    ]  # fmt: skip
    results, scored = score_strict({"vqa": samples}, rules=("medplib", "lmms-eval"))
    found = {(row["target"], row["score"]): row for row in rows([results["vqa"]]) if "target" in row}
    assert scored["vqa"][0].scores["strict"].keys() >= {"medplib_recall", "lmms-eval_open_accuracy"}
    whole = found[None, "medplib_closed_accuracy"]
    assert (whole["value"], whole["n"], whole["patients"]) == (0.5, 12, 6)
    assert whole["low"] == whole["high"] == 0.5  # of each patient one is right
    assert found[None, "medplib_open_accuracy"]["value"] == 1
    assert found[None, "lmms-eval_open_accuracy"]["value"] == 0
    of_ct = found["modality: CT", "medplib_closed_accuracy"]
    assert (of_ct["value"], of_ct["n"], of_ct["low"]) == (0.5, 6, None)  # three patients
    assert ("answer_type: open", "medplib_f1") in found and ("answer_type: closed", "medplib_f1") not in found
    assert NO_METEOR in results["vqa"].notes


def test_choices_have_one_rule():
    sample = Sample("vqa", "1", "?", answer="MRI", prediction="B.", choices=("CT", "MRI"))
    assert score_answer(sample, ("medplib", "lmms-eval")) == {"choice_accuracy": 1}
    assert score_answer(Sample("vqa", "1", "?", answer="MRI"), ("medplib",)) == {}


@pytest.mark.parametrize("number", [7, 12])
def test_means_over_rare_groups_are_noted(number):
    """The second dataset has one patient of seven, or six of twelve."""
    samples = [
        Sample("vqa", str(n), "<image>\n?", answer="liver", patient=f"p{n}", prediction="liver",
               dataset="rare" if n >= 6 else "usual", image=str(n), groups={"answer_type": "open"})
        for n in range(number)
    ]  # fmt: skip
    results, _ = score_strict({"vqa": samples}, rules=("medplib",))
    noted = [note for note in results["vqa"].notes if note.startswith("Targets of fewer than 5 patients: 1.")]
    assert len(noted) == (number == 7)
