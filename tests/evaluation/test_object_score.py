"""What an object score is worth, on records with present and absent targets."""

import numpy as np
import pytest

from unibiomed_jax.evaluation.object_score import object_score_table
from unibiomed_jax.evaluation.records import Sample, encode_masks, with_scores
from unibiomed_jax.evaluation.scoring import score_strict

DRAWN, EMPTY = np.ones((4, 4), bool), np.zeros((4, 4), bool)


def sample(number, present, score, dice=1.0):
    found = Sample(
        "seg2d",
        str(number),
        "?",
        patient=f"p{number}",
        truth_masks=encode_masks([DRAWN if present else EMPTY]),
        masks=encode_masks([DRAWN]),
        object_scores=(score,),
    )
    return with_scores(found, "strict", {"dice": dice if present else 0.0})


def test_the_auroc_counts_pairs_and_lies_in_its_interval():
    generator = np.random.default_rng(1)
    present = generator.random(60) < 0.6
    scores = np.round(generator.normal(present * 1.0, 1), 1)  # some are equal
    found = object_score_table([sample(*row) for row in zip(range(60), present, scores, strict=True)])
    pairs = scores[present][:, None] - scores[~present]
    assert found["auroc"] == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    low, high = found["auroc_interval"]
    assert 0.5 < low < found["auroc"] < high < 1
    assert not found["constant"] and (found["present"], found["absent"]) == (present.sum(), (~present).sum())
    assert sum(row["n"] for row in found["bins"]) == 60
    at_zero = next(row for row in found["thresholds"] if row["above"] == 0)
    assert at_zero["absent_hidden"] == pytest.approx(np.mean(scores[~present] <= 0))
    assert at_zero["present_hidden"] == pytest.approx(np.mean(scores[present] <= 0))
    kept = np.where(scores > 0, present, ~present)  # a hidden mask is right where nothing is
    assert at_zero["dice"] == pytest.approx(kept.mean())


def test_a_head_without_training_and_one_kind_of_target_are_named():
    same = [sample(number, number % 2, 1.0, 0.5) for number in range(12)]
    notes = score_strict({"seg2d": same})[0]["seg2d"].notes
    assert any("was never trained" in note for note in notes)
    present = [sample(number, True, float(number)) for number in range(12)]
    found = object_score_table(present)
    assert found["auroc"] is None and found["thresholds"][0]["absent_hidden"] is None
    notes = score_strict({"seg2d": present})[0]["seg2d"].notes
    assert any("All targets are present" in note for note in notes)
    apart = [sample(number, number % 2, float(number % 2 * 4 - 2)) for number in range(12)]
    (note,) = [n for n in score_strict({"seg2d": apart})[0]["seg2d"].notes if "AUROC" in n]
    assert "AUROC 1.000" in note and "hide 100% of the absent and 0% of the present" in note
    assert object_score_table([Sample("seg2d", "0", "?", scores={"strict": {"dice": 1.0}})]) is None
