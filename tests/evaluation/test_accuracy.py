"""How well a model answers: which records are asked, how they are scored, what the command tells."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from places import ROOT, SAMPLE_DATA, TINY

from unibiomed_jax import UniBiomed
from unibiomed_jax.data.records import Kind, Record
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.accuracy import Result, ask, conversation, dice, markdown, read_records, tables

pytestmark = pytest.mark.slow


@pytest.fixture
def script():
    """scripts/measure_accuracy.py as a module."""
    path = ROOT / "scripts" / "measure_accuracy.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


def record(kind=Kind.SEGMENTATION, text="spleen", patient="a"):
    return Record(f"{patient}/{text}", kind, images=(f"{patient}.png",), texts=(text,), patient=patient)


def test_the_records_are_those_of_the_datasets_named():
    records = read_records(SAMPLE_DATA, "test", ["hc18_fetal_head", "isic2017"])
    assert {Path(r.images[0]).parents[1].name for r in records} == {"hc18_fetal_head", "isic2017"}
    assert {r.kind for r in records} == {
        Kind.SEGMENTATION,
        Kind.REGION,
        Kind.DISEASE,
        Kind.VQA,
        Kind.REPORT,
    }
    assert len(read_records(SAMPLE_DATA, "test", [])) > len(records)


def test_a_dataset_that_is_not_there_is_named():
    with pytest.raises(InputError, match="no dataset fetal_haed; correct --datasets"):
        read_records(SAMPLE_DATA, "test", ["isic2017", "fetal_haed"])


def run(script, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["measure_accuracy.py", *map(str, options)])
    with pytest.raises(SystemExit) as end:
        script.run(script.Args, script.main)
    return end.value.code


@pytest.mark.parametrize(
    "options, said",
    [
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--split", "tset"), "'tset'"),
        (("--datasets", "auto_isic2017_dermoscopy"), "split 'test' of auto_isic2017_dermoscopy"),
        (("--batch", "0"), "--batch 0"),
        (("--json", Path(__file__) / "results.json"), "results.json cannot be written"),
    ],
)
def test_what_cannot_be_used_is_one_line(script, monkeypatch, capsys, options, said):
    if "--checkpoint" not in options:
        options += ("--checkpoint", TINY)
    assert run(script, monkeypatch, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1 and said in error


def test_folders_of_the_results_are_made_before_anything_is_asked(script, monkeypatch, tmp_path):
    page, entries = tmp_path / "a" / "page.md", tmp_path / "b" / "c" / "results.json"

    def answered(*_):
        assert page.parent.is_dir() and entries.parent.is_dir()
        return [Result(record(), 0.5, "It is [SEG].")]

    monkeypatch.setattr(script, "ask", answered)
    assert run(script, monkeypatch, "--checkpoint", TINY, "--markdown", page, "--json", entries) == 0
    assert "| spleen | 0.50 | 1 | 1 |" in page.read_text()
    assert json.loads(entries.read_text())[0]["score"] == 0.5


def test_a_dataset_without_this_split_is_passed_over():
    # auto_isic2017_dermoscopy only trains.
    both = read_records(SAMPLE_DATA, "test", ["isic2017", "auto_isic2017_dermoscopy"])
    assert len(both) == len(read_records(SAMPLE_DATA, "test", ["isic2017"]))


def test_dice_counts_a_volume_as_one_mask_and_no_answer_as_nothing():
    def answer(mask):
        return SimpleNamespace(segments=(SimpleNamespace(mask=mask),))

    found, truth = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    found[0, :2] = True  # 8 pixels, 4 of them right
    truth[0, 1:2] = truth[1] = True  # 20 pixels
    assert dice(answer(found), truth) == pytest.approx(2 * 4 / (8 + 20))
    assert dice(answer(found[0]), found[0]) == 1
    assert dice(SimpleNamespace(segments=()), truth) == 0


def test_targets_cases_and_patients_are_counted_and_targets_weigh_the_same():
    scores = (
        (record(patient="a"), 1.0),
        (record(patient="b", text="Spleen"), 0.0),
        (record(text="liver"), 0.8),
    )
    results = [Result(r, score, "") for r, score in scores]
    results.append(Result(record(kind=Kind.DISEASE, text="melanoma"), 1.0, "Melanoma."))
    rows = tables(results)
    assert rows["segmentation"] == [
        ("liver", 0.8, 1, 1),
        ("spleen", 0.5, 2, 2),
        ("mean of the targets", pytest.approx(0.65), 3, 0),
    ]
    assert rows["disease"] == [("all", 1.0, 1, 1)]
    page = markdown(rows)
    assert "| spleen | 0.50 | 2 | 2 |" in page and "| disease | right | cases | patients |" in page


def test_a_record_scores_what_the_model_gives_on_its_question():
    model = UniBiomed.from_pretrained(TINY)
    first = [
        r for r in read_records(SAMPLE_DATA, "test", ["hc18_fetal_head"]) if r.kind is Kind.SEGMENTATION
    ][:1]
    (result,) = ask(model, first, 4)
    answer = model.predict(model.open(first[0].images[0]), conversation(first[0]).question, max_new_tokens=96)
    with Image.open(first[0].masks[0][0]) as file:
        truth = np.asarray(file) > 0
    found = answer.segments[0].mask
    assert result.text == answer.text
    assert result.score == pytest.approx(2 * (found & truth).sum() / (found.sum() + truth.sum()), abs=1e-6)
