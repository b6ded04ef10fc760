"""The phrases of an answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unibiomed_jax.inference.phrases import clean_answer, parse_answer, requested_target
from unibiomed_jax.inputs.prompt import STOP_TEXT


@pytest.mark.parametrize(
    ("answer", "question", "phrases"),
    [
        ("<p> the heart. enlarged. </p> [SEG]<|end|>", "", ["the heart. enlarged"]),
        ("<p>a</p> [SEG], [SEG] and [SEG]; <p>b</p>[SEG]", "", ["a", "a", "a", "b"]),
        ("<p> x <p> b </p> then [SEG]", "", ["b"]),
        ("<p> open [SEG]", "", ["open"]),
        ("The liver [SEG] and the spleen [SEG] are normal.", "", ["The liver", "and the spleen are normal"]),
        ("No effusion. A 2.5 cm nodule [SEG] is seen. End.<|end|>", "", ["A 2.5 cm nodule is seen"]),
        ("It is [SEG]. lung tumor in chest ct.<|end|>", "<image>Any tumor?", ["lung tumor in chest ct"]),
        ("[SEG]. lung tumor in chest ct.<|end|>", "", ["lung tumor in chest ct"]),
        ("It is [SEG]. liver. It is [SEG]. spleen.", "", ["liver", "spleen"]),
        (
            "Sure, it is [SEG].<|end|>",
            "<image>Please segment the liver in abdomen CT.",
            ["liver in abdomen CT"],
        ),
        ("Sure, the segmentation result is [SEG].<|end|>", "<image>Any tumor?", ["Any tumor?"]),
        ("It is [SEG].<|end|>", "", ["It is"]),
        ("[SEG]", "", [""]),
        ("Nothing is wrong.", "<image>Any tumor?", []),
        ("", "", []),
    ],
)
def test_phrases(answer, question, phrases):
    parsed = parse_answer(answer, question)
    assert [phrase.text for phrase in parsed] == phrases
    assert all(answer.startswith("[SEG]", phrase.position) for phrase in parsed)


def test_marked_phrases_are_told_apart():
    assert [phrase.marked for phrase in parse_answer("<p>a</p> [SEG]. The liver [SEG].")] == [True, False]


@pytest.mark.parametrize(
    "question",
    [
        "Can you segment the {}?",
        "Please segment {}.",
        "What is {}? Please respond with segmentation mask.",
        "What is {}? Please output segmentation mask",
        "Could you provide a segmentation mask for the {}?",
        "Please identify and segment the {}.",
        "Where is the {}? Please respond with a segmentation mask.",
        "Can you highlight the {} with a segmentation mask?",
        "Can you highlight the {}with a segmentation mask",
        "Please segment the {} in this video.",
    ],
)
def test_targets_of_the_training_questions(question):
    assert requested_target("<image>\n" + question.format("left lung in chest CT")) == "left lung in chest CT"


def test_other_questions_are_their_own_target():
    assert requested_target("<image>What is wrong here?") == "What is wrong here?"


parts = st.sampled_from(
    ["[SEG]", "<p>", "</p>", ". ", "\n", "liver", " and ", "It is ", "Sure, ", "<|end|>", "1.5", "<"]
)


@given(st.lists(parts, max_size=15), st.text(max_size=20))
def test_every_seg_has_one_clean_phrase(pieces, question):
    answer = "".join(pieces)
    phrases = parse_answer(answer, question)
    assert [phrase.position for phrase in phrases] == [
        index for index in range(len(answer)) if answer.startswith("[SEG]", index)
    ]
    for phrase in phrases:
        assert not any(mark in phrase.text for mark in ("[SEG]", "<p>", "</p>", "<|end|>", "\n"))


@given(
    st.lists(
        st.tuples(st.sampled_from(["liver", "left lung", "no findings in lung"]), st.integers(1, 3)),
        max_size=5,
    )
)
def test_marked_phrases_come_back(groups):
    answer = "".join(f"<p> {name} </p>{' [SEG]' * count} is seen. " for name, count in groups) + STOP_TEXT
    assert [phrase.text for phrase in parse_answer(answer)] == [
        name for name, count in groups for _ in range(count)
    ]


def test_clean_answer():
    assert clean_answer("Sure, <p> the liver </p> [SEG] .\nEnd.<|end|>") == "Sure, the liver [SEG]. End."
