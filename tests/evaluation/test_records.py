"""Records of a run: what is written comes back, whatever interrupts the writing."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.records import (
    Sample,
    SampleWriter,
    encode_masks,
    from_json,
    read_samples,
    to_json,
    with_scores,
    write_samples,
)

texts = st.text(max_size=8)
masks = st.lists(arrays(bool, st.tuples(st.integers(1, 5), st.integers(1, 5))), max_size=2).map(encode_masks)
samples = st.builds(
    Sample,
    task=st.just("vqa"),
    doc_id=texts,
    question=texts,
    answer=st.none() | texts,
    response=st.none() | texts,
    prediction=st.none() | texts,
    category=texts,
    patient=st.none() | texts,
    spacing=st.none() | st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)),
    truth_masks=masks,
    masks=masks,
    scores=st.dictionaries(texts, st.dictionaries(texts, st.floats(0, 1))),
    reason=st.none() | texts,
)


@given(samples)
def test_records_come_back(sample):
    line = json.loads(json.dumps(to_json(sample, 3)))
    assert from_json(line, "x") == sample
    assert (line["index"], line["input"], line["target"]) == (3, sample.question, sample.answer)


def sample(number, **more):
    return Sample("vqa", str(number), "What?\u2028 is it", **more)


def test_other_programs_find_their_fields():
    line = to_json(sample(1, answer="a", response="<p>b</p>", prediction="b", category="c"), 0)
    assert {"doc_id", "doc_hash", "input", "target", "resps", "filtered_resps"} <= set(line)
    assert {"index", "question", "answer", "prediction", "category"} <= set(line)
    assert line["resps"] == [["<p>b</p>"]] and line["filtered_resps"] == ["b"]


def test_half_a_line_is_asked_again(tmp_path):
    path = tmp_path / "samples_vqa.jsonl"
    with SampleWriter(path) as file:
        file.write(sample(0))
        file.write(sample(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [s.doc_id for s in read_samples(path, "vqa")] == ["0"]
    with SampleWriter(path) as file:
        file.write(sample(1))
    assert path.read_bytes() == whole


def test_the_last_answer_counts(tmp_path):
    path = tmp_path / "samples_vqa.jsonl"
    with SampleWriter(path) as file:
        file.write(sample(0, reason="out of memory"))
        file.write(sample(1, prediction="b"))
        file.write(sample(0, prediction="a"))
    assert [(s.doc_id, s.prediction) for s in read_samples(path, "vqa")] == [("0", "a"), ("1", "b")]


def test_scores_are_written_into_the_records(tmp_path):
    path = tmp_path / "run" / "samples_vqa.jsonl"
    write_samples(path, [with_scores(sample(0), "strict", {"exact": 1.0})])
    (found,) = read_samples(path, "vqa")
    assert found.scores == {"strict": {"exact": 1.0}} and found.key == sample(0).key


def test_a_hash_tells_what_is_asked_apart():
    mask = encode_masks([np.eye(3, dtype=bool)])
    assert sample(0).doc_hash == sample(0, prediction="x", masks=mask, patient="p").doc_hash
    others = [sample(0), sample(1), sample(0, answer="x"), sample(0, truth_masks=mask), sample(0, image="i")]
    assert len({other.doc_hash for other in others}) == len(others)


def test_images_are_patients_where_nobody_says():
    assert sample(0, image="a.png").group == sample(1, image="a.png").group
    assert sample(0, image="a.png").group != sample(0, patient="a.png").group
    assert sample(0).group != sample(1).group


@pytest.mark.parametrize(
    "lines, complaint",
    [
        ([], "holds no record of the task 'vqa'"),
        (["{}"], "line 1 has no task"),
        (["[1]"], "line 1 is no record"),
        (["{", '{"task": "vqa"}'], "line 1 is no JSON"),
        (['{"task": "vqa", "doc_id": 3, "question": ""}'], "doc_id that is no text"),
        (['{"task": "vqa", "doc_id": "3", "question": "", "answer": 2}'], "answer that is no text"),
        (['{"task": "seg2d", "doc_id": "3", "question": ""}'], "of the task 'seg2d', not 'vqa'"),
        (['{"task": "vqa", "doc_id": "3", "question": "", "spacing": [0, 1]}'], "above 0, or null"),
        (['{"task": "vqa", "doc_id": "3", "question": "", "masks": [{"size": [1, 1]}]}'], "run-length"),
        (['{"task": "vqa", "doc_id": "3", "question": "", "scores": {"a": 1}}'], "of another form"),
        (
            [f'{{"task": "vqa", "doc_id": "3", "question": "{text}"}}' for text in "ab"],
            "repeats the doc_id '3'",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, lines, complaint):
    path = tmp_path / "samples_vqa.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match=complaint):
        read_samples(path, "vqa")


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        read_samples(tmp_path / "samples_vqa.jsonl", "vqa")
    (tmp_path / "samples_vqa.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is damaged"):
        read_samples(tmp_path / "samples_vqa.jsonl", "vqa")


def test_a_line_that_ends_within_a_letter_is_asked_again(tmp_path):
    path = tmp_path / "samples_vqa.jsonl"
    line = '{"task": "vqa", "doc_id": "%s", "question": "Schädel?"}'
    path.write_bytes((line % 1).encode() + b"\n" + (line % 2).encode().partition(b"\xa4")[0])
    assert [sample.doc_id for sample in read_samples(path, "vqa")] == ["1"]


def test_an_answer_that_only_lmms_eval_names_counts(tmp_path):
    path = tmp_path / "samples_vqa.jsonl"
    line = {"task": "vqa", "doc_id": "1", "question": "", "resps": [["yes."]], "filtered_resps": ["yes"]}
    path.write_text(json.dumps(line) + "\n")
    (sample,) = read_samples(path, "vqa")
    assert (sample.response, sample.prediction) == ("yes.", "yes")
