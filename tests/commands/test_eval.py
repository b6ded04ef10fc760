"""`unibiomed eval`: folders and records in, numbers with their stamps out, one sentence for what is wrong."""

import csv
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from places import FILES

from unibiomed_jax.commands.eval.compare import compare
from unibiomed_jax.commands.eval.options import CompareOptions, EvalOptions
from unibiomed_jax.commands.eval.run import evaluate
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.java import Java
from unibiomed_jax.evaluation.records import Sample, SampleWriter, encode_masks, read_samples, samples_file

FOLDERS = {"report": "grg", "caption": "medtrinity"}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(FILES / "eval_golden.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """Its programs take seconds to start."""
    monkeypatch.setattr(Java, "find", classmethod(lambda cls: None))


def options(golden, out, task, **more):
    place = golden / FOLDERS.get(task, task)
    return EvalOptions(out, task=(task,), predictions=place / "pred", data=place / "data", **more)


def numbers(out):
    content = json.loads((out / "results.json").read_text())
    return content, {(found["task"], found["protocol"]): found for found in content["results"]}


def table(out):
    return list(csv.DictReader((out / "results.csv").open()))


@pytest.mark.parametrize("task", ["disease", "gvqa", "report", "caption", "seg2d", "seg3d"])
def test_the_papers_numbers_of_folders(golden, tmp_path, task):
    evaluate(options(golden, tmp_path, task, protocol="paper"))
    content, found = numbers(tmp_path)
    metrics = found[task, "paper"]["numbers"]["metrics"]
    assert content["data"] and content["versions"]["numpy"]
    if task.startswith("seg"):
        wanted = json.loads((golden / task / "results.json").read_text())["mean"]
        assert metrics == pytest.approx({name: wanted[name] for name in metrics}, abs=1e-12)
        assert found[task, "paper"]["numbers"]["classes"]
    else:
        lines = (golden / FOLDERS.get(task, task) / "scores.txt").read_text().splitlines()
        names = {"Accuracy": "accuracy", "Mean Dice (mDice) across all images": "mdice"}
        for name, value in (line.split(": ") for line in lines):
            if name != "METEOR":
                assert f"{metrics[names.get(name, name)]:.3f}" == value
        notes = found[task, "paper"]["notes"]
        assert notes == ([] if task == "disease" else ["Tokens of the texts: own tokens.", notes[-1]])
        assert task == "disease" or "METEOR: not computed" in notes[-1]


def test_slices_without_a_table(golden, tmp_path):
    """As by the stand-alone script of volumes."""
    place = golden / "cal3d"
    evaluate(
        EvalOptions(
            tmp_path, task=("seg3d",), predictions=place / "pred", data=place / "gt", protocol="paper"
        )
    )
    printed = (place / "stdout.txt").read_text().split()[-3:]
    metrics = numbers(tmp_path)[1]["seg3d", "paper"]["numbers"]["metrics"]
    assert [metrics[name] for name in ("dice", "nsd", "hd95")] == pytest.approx(
        list(map(float, printed)), abs=1e-12
    )


def test_strict_numbers_come_with_intervals_and_reasons(golden, tmp_path):
    assert evaluate(options(golden, tmp_path, "disease", protocol="both")) == 1
    content, found = numbers(tmp_path)
    strict = found["disease", "strict"]
    assert strict["unscored"] == {
        name: "no prediction, or one that cannot be read" for name in ("149", "191")
    }
    assert any("name no patient" in note for note in strict["notes"])
    rows = {(row["protocol"], row["target"], row["score"]): row for row in table(tmp_path)}
    dice = rows["strict", "", "dice"]
    assert float(dice["low"]) < float(dice["value"]) < float(dice["high"]) and dice["n"] == "13"
    assert rows["paper", "", "mdice"]["n"] == "15" and dice["data"] == content["data"]
    # What was read is there as records, and scored again without the folders.
    before = (tmp_path / "results.json").read_text()
    assert evaluate(EvalOptions(tmp_path, protocol="both")) == 1
    again, of_records = numbers(tmp_path)
    assert of_records["disease", "strict"] == strict and again["data"] == content["data"]
    assert json.loads(before)["results"][0]["numbers"]["metrics"] == pytest.approx(
        of_records["disease", "paper"]["numbers"]["metrics"]
    )


@pytest.mark.parametrize("task", ["seg3d", "disease", "gvqa", "caption"])
def test_predictions_go_through_records_into_folders(golden, tmp_path, task):
    given = options(golden, tmp_path / "run", task)
    evaluate(given)
    evaluate(EvalOptions(tmp_path / "run", folders=tmp_path / "folders"))
    evaluate(replace(given, protocol="paper"))
    _, expected = numbers(tmp_path / "run")
    evaluate(replace(given, out=tmp_path / "again", predictions=tmp_path / "folders", protocol="paper"))
    assert numbers(tmp_path / "again")[1][task, "paper"]["numbers"] == expected[task, "paper"]["numbers"]


def test_folders_of_masks_and_regions(tmp_path):
    write(tmp_path / "run", segmented(1))
    regions = [
        Sample("region", str(n), "?", "liver in abdomen CT", response=said, image=f"{n}.png")
        for n, said in enumerate(["Liver in abdomen CT.<|end|>", "left kidney in abdomen CT"])
    ]
    write(tmp_path / "run", regions)
    evaluate(EvalOptions(tmp_path / "run", protocol="paper", folders=tmp_path / "folders"))
    assert len(list((tmp_path / "folders/test").glob("*.png"))) == 8
    (written,) = (tmp_path / "folders").glob("region_cap_pred_accuracy-0.5.json")
    assert json.loads(written.read_text())[1]["prediction"] == "kidney in CT"
    rows = {(row["task"], row["score"]): row["value"] for row in table(tmp_path / "run")}
    assert rows["region", "accuracy"] == "0.5"
    evaluate(
        EvalOptions(
            tmp_path / "again",
            task=("region",),
            predictions=tmp_path / "folders",
            data=tmp_path,
            protocol="paper",
        )
    )
    assert {row["value"] for row in table(tmp_path / "again")} == {"0.5"}


def write(run, samples):
    with SampleWriter(samples_file(run, samples[0].task)) as file:
        for sample in samples:
            file.write(sample)


def square(start):
    mask = np.zeros((24, 24), bool)
    mask[4:12, start : start + 8] = True
    return encode_masks([mask])


def segmented(shift, number=8):
    return [
        Sample(
            "seg2d",
            f"{n}.png",
            "Please segment the liver.",
            category="liver" if n % 2 else "spleen",
            dataset="ct",
            patient=f"p{n}",
            spacing=(0.5, 0.5),
            truth_masks=square(4),
            masks=square(4 + shift + n % 3),
        )
        for n in range(number)
    ]


def test_runs_are_compared_patient_by_patient(tmp_path, capsys):
    for name, shift in (("first", 2), ("second", 1)):
        write(tmp_path / name, segmented(shift))
        assert evaluate(EvalOptions(tmp_path / name)) == 0
    capsys.readouterr()
    assert compare(CompareOptions(tmp_path / "first", tmp_path / "second", csv=tmp_path / "c.csv")) == 0
    assert "dice" in capsys.readouterr().out
    rows = {(r["dataset"], r["target"], r["score"]): r for r in csv.DictReader((tmp_path / "c.csv").open())}
    whole = rows["", "", "dice"]
    assert float(whole["difference"]) == pytest.approx(1 / 8)  # a column of eight
    assert (float(whole["low"]), float(whole["high"])) == pytest.approx((1 / 8, 1 / 8))
    assert rows["ct", "liver", "dice"]["low"] == ""  # four patients
    assert float(rows["", "", "hd95_mm"]["difference"]) == pytest.approx(-0.5)


def test_runs_over_other_data_are_not_compared(tmp_path):
    write(tmp_path / "first", segmented(1))
    write(tmp_path / "second", [replace(s, category="kidney") for s in segmented(1)])
    write(tmp_path / "third", [replace(s, doc_id=f"other{s.doc_id}") for s in segmented(1)])
    runs = [tmp_path / name for name in ("first", "second", "third")]
    with pytest.raises(InputError, match="no scored record in common"):
        compare(CompareOptions(runs[0], runs[1]))
    for run in runs:
        evaluate(EvalOptions(run))
    with pytest.raises(InputError, match="is another record"):
        compare(CompareOptions(runs[0], runs[1]))
    with pytest.raises(InputError, match="no scored record in common"):
        compare(CompareOptions(runs[0], runs[2]))


def test_what_cannot_be_compared_is_listed_and_the_rest_scored(tmp_path):
    samples = segmented(0)
    samples[2] = replace(samples[2], masks=encode_masks([np.zeros((24, 25), bool)]))
    samples[3] = replace(samples[3], reason="out of memory")
    samples[4] = replace(samples[4], truth_masks=())
    write(tmp_path, samples)
    assert evaluate(EvalOptions(tmp_path)) == 1
    (found,) = numbers(tmp_path)[1].values()
    assert found["numbers"]["n"] == 5
    assert found["unscored"] == {
        "2.png": "a mask of 25x24 pixels for a truth of 24x24",
        "3.png": "out of memory",
        "4.png": "neither a truth mask nor an answer to compare",
    }
    assert len(read_samples(samples_file(tmp_path, "seg2d"), "seg2d")) == 8


def test_right_answers(tmp_path):
    said = ["The liver.", "It is the liver", "Deliver", None]
    samples = [
        Sample("vqa", str(n), "Which organ?", "the liver" if n < 2 else "liver", prediction=text)
        for n, text in enumerate(said)
    ]
    write(tmp_path, samples)
    evaluate(EvalOptions(tmp_path, protocol="both"))  # the paper knows no vqa
    scored = read_samples(samples_file(tmp_path, "vqa"), "vqa")
    scores = [(s.scores["strict"]["exact"], s.scores["strict"]["holds"]) for s in scored]
    assert scores == [(1, 1), (0, 1), (0, 0), (0, 0)]
    with pytest.raises(InputError, match="no scripts for vqa"):
        evaluate(EvalOptions(tmp_path, protocol="paper"))


def test_own_tolerances(tmp_path):
    write(tmp_path, segmented(2))
    (tmp_path / "mm.json").write_text('{"liver": 0.1}')
    evaluate(EvalOptions(tmp_path, tolerances=tmp_path / "mm.json"))
    own = {row["target"] for row in table(tmp_path) if row["score"] == "nsd_own_mm"}
    assert own == {"", "liver"}
    (tmp_path / "mm.json").write_text('{"liver": "wide"}')
    with pytest.raises(InputError, match="mm.json is no table"):
        evaluate(EvalOptions(tmp_path, tolerances=tmp_path / "mm.json"))


def test_options_that_do_not_fit(golden, tmp_path):
    for wrong, complaint in (
        (EvalOptions(tmp_path), "holds no samples_TASK.jsonl"),
        (EvalOptions(tmp_path, task=("vqa",)), "samples_vqa.jsonl is missing"),
        (EvalOptions(tmp_path, data=tmp_path), "--data belongs to --checkpoint or --predictions"),
        (EvalOptions(tmp_path, predictions=tmp_path, folders=tmp_path), "--folders writes"),
        (EvalOptions(tmp_path, predictions=tmp_path, task=("seg2d",)), "name its folder with --data"),
        (EvalOptions(tmp_path, predictions=tmp_path, data=tmp_path), "name it with --task"),
        (options(golden, tmp_path, "seg2d"), "lists case000_liver.png twice"),
        (replace(options(golden, tmp_path, "disease"), task=("vqa",)), "no prediction folders of vqa"),
    ):
        with pytest.raises(InputError, match=complaint):
            evaluate(wrong)
