"""`unibiomed eval reproduce`: what is there is asked and scored as the paper does; the rest stays empty."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from places import ROOT
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax.commands.eval import run
from unibiomed_jax.commands.eval.answer import CONFIG
from unibiomed_jax.commands.eval.listing import list_known
from unibiomed_jax.commands.eval.options import EvalOptions, ListOptions, ReproduceOptions
from unibiomed_jax.commands.eval.reproduce import reproduce
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation import published
from unibiomed_jax.evaluation.answering import by_task
from unibiomed_jax.evaluation.readers import read_records
from unibiomed_jax.evaluation.readers.reference import reference_datasets
from unibiomed_jax.evaluation.records import encode_masks, samples_file, write_samples


@pytest.fixture
def biomed(tmp_path):
    """Two of the reference's test sets: ACDC with two masks, and a disease."""
    for name in ("ACDC", "Disease/Skin"):
        table = coco_table(2, "heart in cardiac MRI")
        for annotation in table["annotations"]:
            save_picture(tmp_path / "Biomed" / name / "test" / annotation["file_name"])
            save_square(tmp_path / "Biomed" / name / "test_mask" / annotation["mask_file"])
        write_table(tmp_path / "Biomed" / name / "test.json", table)
    return tmp_path / "Biomed"


@pytest.fixture
def answers(monkeypatch):
    """A model that outlines half of every target and names everything heart."""
    asked = []

    def answer(options: EvalOptions) -> int:
        asked.append(options)
        samples = read_records(options.data, options.split, options.task, format=options.format)
        half = np.zeros((30, 60), bool)
        half[4:10, 5:17] = True
        for task, of_task in by_task(samples).items():
            said = [
                replace(
                    sample,
                    response="heart in cardiac MRI",
                    prediction="heart in cardiac MRI",
                    masks=encode_masks([half]),
                )
                for sample in of_task
            ]
            write_samples(samples_file(options.out, task), said)
        (options.out / CONFIG).write_text(json.dumps({"checkpoint": "0123abcd"}))
        return 0

    monkeypatch.setattr(run, "answer", answer)
    return asked


def test_numbers_of_what_is_there(biomed, answers, tmp_path):
    out = tmp_path / "out"
    assert reproduce(ReproduceOptions("released", biomed, out=out)) == 0
    assert answers[0].task == ("seg2d", "disease", "region") and answers[0].format == "reference"
    rows = {
        (row["task"], row["dataset"], row["score"]): row
        for row in csv.DictReader((out / "published_numbers.csv").open())
    }
    dice = rows["seg2d", "ACDC", "mean_dice"]
    assert float(dice["here"]) == pytest.approx(2 / 3, abs=1e-6)  # 72 of 144 pixels, and none beside
    assert dice["n"] == "2" and dice["checkpoint"] == "0123abcd"
    assert float(rows["region", "ACDC", "accuracy"]["here"]) == 1
    assert float(rows["disease", "Disease/Skin", "mdice"]["here"]) == pytest.approx(2 / 3)
    filled = {(task, dataset) for (task, dataset, _), row in rows.items() if row["here"]}
    assert filled == {("seg2d", "ACDC"), ("region", "ACDC"), ("disease", "Disease/Skin")}
    page = (out / "published_numbers.md").read_text()
    assert "| ACDC | mean_dice |  | 0.6667 | 2 |" in page and "| CRAG | mean_dice |  |  |  |" in page
    assert "checkpoint 0123abcd" in page
    assert "\nDisease/Skin: Images without an annotation are not asked" in page


def test_a_mask_that_cannot_be_used_spoils_no_other(biomed, answers, tmp_path):
    (mask, *_) = sorted((biomed / "ACDC" / "test_mask").glob("*"))
    mask.unlink()
    out = tmp_path / "out"
    assert reproduce(ReproduceOptions("released", biomed, out=out, task=("seg2d",))) == 1
    page = (out / "published_numbers.md").read_text()
    assert "| ACDC | mean_dice |  | 0.6667 | 1 |" in page and "\nACDC: 1 not scored." in page


def test_only_some_tasks(biomed, answers, tmp_path):
    options = ReproduceOptions("released", biomed, out=tmp_path / "out", task=("disease",))
    reproduce(options)
    assert answers[0].task == ("disease",)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"holds no test set of UniBiomed \(such as ACDC/test.json\)"):
        reproduce(ReproduceOptions("released", tmp_path))


def test_the_page_is_shipped_empty():
    """If not: write `published.render({}, {})` there."""
    assert (ROOT / "docs/published_numbers.md").read_text() == published.render({}, {})


def test_every_set_that_the_scripts_evaluate_has_its_rows():
    rows = published.published_numbers()
    evaluated = [(found.task, found.folder) for found in reference_datasets() if found.evaluated]
    assert {(row.task, row.dataset) for row in rows} == set(evaluated)
    assert len(rows) == len(set(rows))
    assert all(bool(row.value) == bool(row.source) for row in rows)  # no number without its place


def test_list(capsys):
    assert list_known(ListOptions()) == 0
    shown = capsys.readouterr().out
    assert "SLAKE: --format slake; vqa; --split train validation test\n    licence: CC BY 4.0\n" in shown
