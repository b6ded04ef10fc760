"""The numbers that the card of unibiomed-tiny and the README say are those of the run that is shipped."""

import json
import re

import numpy as np
import pytest
from places import ROOT, SAMPLE_DATA, TINY

from unibiomed_jax import checkpoint
from unibiomed_jax.commands.eval.options import EvalOptions
from unibiomed_jax.commands.eval.run import evaluate

CARD = ROOT / "docs" / "unibiomed_tiny.md"
RUN = ROOT / "docs" / "unibiomed_tiny" / "results.json"
ABSENT = ROOT / "docs" / "unibiomed_tiny" / "absent.json"


def estimates(content):
    """(task, score, dataset, target) -> estimate, of the strict protocol."""
    return {
        (result["task"], one["score"], one["dataset"], one["target"]): one
        for result in content["results"]
        for one in result["numbers"]["estimates"]
    }


@pytest.fixture(scope="module")
def run():
    return json.loads(RUN.read_text())


def interval(one):
    return "" if one["interval"] is None else "{:.2f} to {:.2f}".format(*one["interval"])


def rows(head):
    """The cells of the card's table with this head."""
    text = CARD.read_text().split(head + "\n", 1)[1]
    lines = text[: text.index("\n\n")].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_run_is_of_this_checkpoint(run):
    assert run["checkpoint"] == checkpoint.load(TINY).hash
    assert not any(result["unscored"] for result in run["results"])


def test_the_means_of_the_card(run):
    found = estimates(run)
    table = rows("| task | score | mean | 95 % | cases | patients |")
    assert {row[0] for row in table} == {result["task"] for result in run["results"]}
    for task, score, mean, between, cases, patients in table:
        one = found[task, score, None, None]
        assert [mean, between] == [f"{one['value']:.2f}", interval(one)], (task, score)
        assert (int(cases), int(patients)) == (one["cases"], one["patients"])


@pytest.mark.parametrize("task", ["seg2d", "seg3d"])
def test_every_target_of_the_card(run, task):
    expected = {
        (target, dataset): [f"{one['value']:.2f}", interval(one), str(one["cases"]), str(one["patients"])]
        for (of, score, dataset, target), one in estimates(run).items()
        if (of, score) == (task, "dice") and target is not None
    }
    table = rows(f"| {task}: target | dataset | Dice | 95 % | cases | patients |")
    assert {(row[0], row[1]): row[2:] for row in table} == expected


def test_the_readme_says_the_mean(run):
    one = estimates(run)["seg2d", "dice", None, None]
    targets = sum(
        key[:2] == ("seg2d", "dice") and key[3] is not None for key in estimates(run)
    )  # those of a dataset each
    said = re.search(
        r"unibiomed-tiny, .*mean Dice ([\d.]+) \(([\d. to]+)\) over (\d+) targets",
        (ROOT / "README.md").read_text(),
    )
    assert said is not None
    assert said.groups() == (f"{one['value']:.2f}", interval(one), str(targets))


def test_what_the_card_says_of_the_object_score():
    (result,) = json.loads(ABSENT.read_text())["results"]
    found = result["numbers"]["object_score"]
    assert found["constant"] and found["auroc"] == 0.5 and found["absent"] > 100
    said = f"{found['present']} present and {found['absent']} absent targets"
    assert said in " ".join(CARD.read_text().split())


@pytest.mark.slow
def test_the_command_gives_these_numbers_again(run, tmp_path):
    """Of one dataset of the run, as all would take minutes."""
    name = "hc18_fetal_head"
    evaluate(
        EvalOptions(
            tmp_path,
            checkpoint=TINY,
            data=SAMPLE_DATA,
            datasets=(name,),
            task=("seg2d", "region"),
            max_new_tokens=96,
        )
    )
    again = estimates(json.loads((tmp_path / "results.json").read_text()))
    shipped = estimates(run)
    keys = [key for key in again if key[2] == name]
    assert keys
    for key in keys:
        np.testing.assert_allclose(again[key]["value"], shipped[key]["value"], atol=2e-3)
