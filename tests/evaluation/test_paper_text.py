"""Answers in words by the paper's protocol: the reference's own numbers, and its edge cases."""

import json
import shutil

import pytest

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation import ngrams
from unibiomed_jax.evaluation.paper_text import (
    TextItem,
    clean_disease,
    clean_grounded,
    clean_region,
    disease_accuracy,
    gvqa_accuracy,
    one_line,
    region_accuracy,
    region_is_right,
    shorten,
)
from unibiomed_jax.evaluation.reference_folders import read_grounded
from unibiomed_jax.evaluation.repairs import Repairs


def read(golden, task, folder, repairs=None):
    return read_grounded(
        task, golden / folder / "data", golden / folder / "pred", "test", repairs or Repairs(allowed=False)
    )


def test_answers_are_cleaned_as_by_the_scripts(golden):
    cases = json.loads((golden / "text_clean_up.json").read_text())["clean_up"]
    assert len(cases) == 15
    for case in cases:
        answer = case["model_text"]
        assert clean_disease(answer) == (case["disease"]["caption"], case["disease"]["phrases"])
        for script in ("gvqa", "grg", "medtrinity"):
            assert clean_grounded(answer) == (case[script]["caption"], case[script]["phrases"])
        assert clean_region(answer) == case["region"]


def test_regions(golden):
    cases = json.loads((golden / "text_clean_up.json").read_text())["region"]
    items = []
    for case in cases["items"]:
        assert shorten(case["raw"].lower()) == case["answer"]
        assert clean_region(case["model_text"]) == case["prediction"]
        assert region_is_right(case["answer"], case["prediction"]) == case["correct"]
        items.append(TextItem("", case["answer"], case["prediction"]))
    assert region_accuracy(items, Repairs()) == cases["accuracy"]


def test_no_region_at_all():
    with pytest.raises(InputError, match="ZeroDivisionError"):
        region_accuracy([], Repairs(allowed=False))
    assert region_accuracy([], Repairs(allowed=True)) is None


def test_accuracies(golden):
    expected = json.loads((golden / "disease/expected.json").read_text())
    disease = read(golden, "disease", "disease")
    assert disease_accuracy(disease.texts) == pytest.approx(expected["returned"], abs=1e-12, rel=0)
    gvqa = read(golden, "gvqa", "gvqa")
    printed = json.loads((golden / "gvqa/expected.json").read_text())["printed_accuracy"]
    assert f"Accuracy: {gvqa_accuracy(gvqa.texts):0.3f}" == printed


@pytest.mark.parametrize("task, folder", [("gvqa", "gvqa"), ("report", "grg"), ("caption", "medtrinity")])
def test_scores_of_words(golden, task, folder):
    expected = json.loads((golden / folder / "expected.json").read_text())
    tokens = expected["tokens"]
    names = list(tokens["truth"])
    assert [item.name for item in read(golden, task, folder).texts] == names
    pairs = [[tokens[kind][name][0] for name in names] for kind in ("truth", "prediction")]
    bleu, bleus = ngrams.bleu(*pairs)
    rouge, rouges = ngrams.rouge_l(*pairs)
    cider, ciders = ngrams.cider(*pairs)

    def close(found, wanted):
        assert found == pytest.approx(wanted, abs=1e-12, rel=0)

    for order in range(4):
        close(bleu[order], expected["corpus"][f"Bleu_{order + 1}"])
    close(rouge, expected["corpus"]["ROUGE_L"])
    close(cider, expected["corpus"]["CIDEr"])
    for number, name in enumerate(names):
        wanted = expected["per_image"][name]
        close(rouges[number], wanted["ROUGE_L"])
        close(ciders[number], wanted["CIDEr"])
        for order in range(4):
            close(bleus[number][order], wanted[f"Bleu_{order + 1}"])


def test_scores_at_the_edges():
    """Numbers of edge-cases-of-the-reference.json, in the archive."""
    assert ngrams.bleu(["a b c d"], [""])[0] == [0.0] * 4
    assert ngrams.bleu([], [])[0] == [0.0] * 4
    both_empty = ngrams.rouge_l([""], [""])
    assert both_empty == (1.0, [1.0])
    assert ngrams.rouge_l(["a b", "a b"], ["", "a b"])[1] == [0.0, 1.0]
    assert ngrams.cider(["a b c d", "e f g h"], ["a b c d", "e f g h"])[0] == pytest.approx(10)
    assert ngrams.cider(["a b", "c d"], ["a b", "c d"])[0] == pytest.approx(5)
    assert ngrams.cider(["a", "b"], ["a", "b"])[0] == pytest.approx(2.5)
    assert ngrams.cider(["a b c"], ["a b c"])[0] == 0
    assert ngrams.cider(["a b", "a b"], ["a b", "a b"])[0] == 0
    with pytest.raises(ValueError, match="no texts"):
        ngrams.cider([], [])
    assert ngrams.rouge_l(["a\u00a0b"], ["a b"])[0] < 1 == round(ngrams.bleu(["a\u00a0b"], ["a b"])[0][1])


@pytest.mark.parametrize("separator", ["\r", "\r\n", "\x0b", "\u2028"])
def test_a_line_separator_would_shift_all_texts_after_it(separator):
    items = [TextItem("7", "a nodule", f"a{separator}nodule")]
    with pytest.raises(InputError, match="7 holds a line separator.*other images.*--repair"):
        one_line(items, Repairs(allowed=False))
    (line,) = one_line(items, repairs := Repairs(allowed=True))
    assert line.predicted.split() == ["a", "nodule"] and len(repairs.notes) == 1
    assert one_line([TextItem("7", "a", "b\nc")], Repairs(allowed=False))[0].predicted == "b c"


def edit(golden, tmp_path, change):
    folder = tmp_path / "gvqa"
    shutil.copytree(golden / "gvqa", folder)
    table = json.loads((folder / "data/test.json").read_text())
    change(table)
    (folder / "data/test.json").write_text(json.dumps(table))
    return tmp_path


def remove_caption(table):
    del table["annotations"][0]["caption"]


def remove_category(table):
    del table["annotations"][0]["category_id"]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (remove_caption, "has no caption"),
        (remove_category, "without category_id"),
        (lambda table: table.pop("categories"), "no list of categories"),
    ],
)
def test_tables_that_the_reference_cannot_read(golden, tmp_path, change, complaint):
    folder = edit(golden, tmp_path, change)
    with pytest.raises(InputError, match=f"{complaint}.*KeyError.*--repair"):
        read(folder, "gvqa", "gvqa")
    repairs = Repairs(allowed=True)
    found = read(folder, "gvqa", "gvqa", repairs)
    assert len(found.images) == 10 and len(repairs.notes) == 1
    assert len(found.texts) == len(read(golden, "gvqa", "gvqa").texts) - (change is remove_caption)


def test_what_is_not_scored_has_its_reason(golden):
    unscored = read(golden, "gvqa", "gvqa").unscored
    assert unscored == {
        "gvqa05.png": "2 annotations instead of one",
        "gvqa06.png": "the caption in the table is null",
        "gvqa07.png": "no prediction, or one that cannot be read",
    }
