"""Questions, answers and their tokens: the recorded strings and ids, and what is learned of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_datasets import SIZES

from unibiomed_jax.data import prompts
from unibiomed_jax.data.prompts import Conversation, PromptConfig
from unibiomed_jax.data.records import Kind, Record
from unibiomed_jax.data.transforms import IGNORE, SampleBuilder, SampleConfig
from unibiomed_jax.errors import InputError

CONFIG = PromptConfig()
# A tile is a single visual token.
ONE_TOKEN = replace(SIZES, tokens_per_tile=1)
SEG = Record("a", Kind.SEGMENTATION, ("a.png",), (("m.png",),), ("Liver in abdomen CT.",), size=(40, 30))


def only(record: Record, config: PromptConfig = CONFIG) -> tuple[list[str], list[str]]:
    return prompts.variants(record, config)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("SEG2D_Q", prompts.SEGMENTATION_QUESTIONS),
        ("SEG_A", prompts.SEGMENTATION_ANSWERS),
        ("SEG3D_Q", prompts.SEQUENCE_QUESTIONS),
        ("SEG3D_A", prompts.SEGMENTATION_ANSWERS),
        ("DIS_Q", prompts.DISEASE_QUESTIONS),
        ("DIS_A", prompts.DISEASE_ANSWERS),
        ("REG_Q", prompts.REGION_QUESTIONS),
        ("VQA_Q", tuple("<image>" + question for question in prompts.VQA_QUESTIONS)),
        ("GRG_Q", tuple("<image>" + question for question in prompts.REPORT_QUESTIONS)),
        ("MED_Q", prompts.CAPTION_QUESTIONS),
    ],
)
def test_lists_are_those_of_the_reference(key, ours):
    recorded = json.loads((Path(__file__).parent / "prompts.json").read_text())
    assert list(ours) == recorded[key]


def test_segmentation():
    questions, answers = only(SEG)
    assert questions[0] == "<image>\nCan you segment the liver in abdomen ct?"
    assert questions[15] == "<image>\nCan you highlight the liver in abdomen ctwith a segmentation mask"
    assert answers == ["It is [SEG].", "Sure, [SEG].", "Sure, it is [SEG].",
                       "Sure, the segmentation result is [SEG].", "[SEG]."]  # fmt: skip


def test_sequence_has_no_newline_after_the_images_and_may_bring_its_own_question():
    record = replace(SEG, kind=Kind.SEQUENCE, texts=(" Lung. tumor in chest CT.",), slices=3)
    assert only(record)[0][0] == "<image>Can you segment the lung tumor in chest ct?"
    own = replace(record, texts=("Where is the Tumor?",))
    assert only(own)[0] == ["<image>Where is the Tumor?"]


def test_disease_region_and_caption():
    assert only(replace(SEG, kind=Kind.DISEASE))[1] == [
        "It is [SEG]. liver in abdomen ct.",
        "[SEG]. liver in abdomen ct.",
    ]
    assert only(replace(SEG, kind=Kind.REGION))[1] == ["liver in abdomen ct."]
    caption = Record("c", Kind.CAPTION, ("c.png",), texts=(" A Chest X-ray. ",))
    assert only(caption)[1] == ["A Chest X-ray."]
    assert len(only(caption)[0]) == 30
    assert only(replace(caption, question="Why?"))[0] == ["<image>\nWhy?"]


def test_grounded_questions_and_reports():
    vqa = Record("v", Kind.VQA, ("v.png",), (("m.png",),), ("Nodule",), anatomy="Left Lung")
    questions, answers = only(vqa)
    assert questions[0].startswith("<image>\nCan we observe any signs of abnormality in Left Lung? Please")
    assert answers == ["<p> nodule. </p> [SEG]"]
    report = replace(vqa, kind=Kind.REPORT, report='" A 5 mm Nodule. "')
    assert only(report)[1] == ["<p> nodule. a 5 mm nodule. </p> [SEG]"]
    two = replace(vqa, texts=("Nodule", "Effusion"), masks=(("m.png",), ("n.png",)))
    assert only(two)[1] == ["<p> nodule. </p> [SEG] <p> effusion. </p> [SEG]"]


def test_choices():
    assert (
        only(SEG, PromptConfig(newline_after_image=False))[0][1]
        == "<image>Please segment liver in abdomen ct."
    )
    assert only(SEG, PromptConfig(lower_case=False))[0][1] == "<image>\nPlease segment Liver in abdomen CT."
    assert only(SEG, PromptConfig(name_target=True))[1] == ["[SEG] liver in abdomen ct."]
    volume = replace(SEG, kind=Kind.SEQUENCE, texts=("Liver in abdomen CT.",))
    assert only(volume, PromptConfig(name_target=True))[1] == ["[SEG] liver in abdomen ct."]


def test_wording_is_fixed_by_seed_and_name_or_drawn_anew():
    record = replace(SEG, kind=Kind.REGION, texts=("one", "two", "three"))

    def answers(config, seeds, name="a"):
        return {
            prompts.draw(replace(record, name=name), np.random.default_rng(seed), 42, config).answer
            for seed in seeds
        }

    assert len(answers(CONFIG, range(20))) == 1
    assert answers(PromptConfig(wording="redraw"), range(20)) == {"one", "two", "three"}
    assert len({next(iter(answers(CONFIG, [0], name=str(number)))) for number in range(20)}) == 3


def test_every_question_and_answer_is_drawn_about_equally_often():
    rng = np.random.default_rng(0)
    drawn = [prompts.draw(SEG, rng, 0, CONFIG) for _ in range(4000)]
    counts = np.unique([conversation.question for conversation in drawn], return_counts=True)[1]
    assert len(counts) == 16 and counts.min() > 180 and counts.max() < 330
    counts = np.unique([conversation.answer for conversation in drawn], return_counts=True)[1]
    assert len(counts) == 5 and counts.min() > 700 and counts.max() < 900


# ------------------------------------------------------------------------------------------------------------
# Tokens. The ids were recorded from the reference's own tokenisation.

INSTRUCTION = [27, 91, 872, 91, 397, 151665, 151667, 151666, 198, 5501, 10238, 25506, 304, 63672, 18572,
               15757, 91, 408, 91, 1784, 91, 77091, 91, 397]  # fmt: skip
INFERENCE = [27, 91, 872, 91, 397, 151665, 151667, 151666, 5501, 10238, 25506, 304, 63672, 18572, 15757,
             91, 408, 91, 397, 27, 91, 77091, 91, 397]  # fmt: skip
ANSWERS = {
    (Kind.SEGMENTATION, "It is [SEG]."): [2132, 374, 220, 151674, 15757, 91, 408, 91, 29],
    (Kind.DISEASE, "It is [SEG]. brain tumor in brain MRI."): [
        2132, 374, 220, 151674, 13, 8109, 35154, 304, 8109, 51360, 15757, 91, 408, 91, 29],
    (Kind.VQA, "<p> no findings in lung. </p> [SEG]"): [
        7926, 29, 902, 14613, 304, 20622, 13, 690, 79, 29, 220, 151674, 27, 91, 408, 91, 29],
    (Kind.REGION, "liver in abdomen ct"): [75, 1524, 304, 63672, 20251, 27, 91, 408, 91, 29],
}  # fmt: skip


def encode(tokenizer, record, conversation, tiles=1, **choices):
    builder = SampleBuilder(SampleConfig(**choices), ONE_TOKEN, tokenizer, 0)
    return [array.tolist() for array in builder.encode(record, conversation, tiles)]


@pytest.mark.parametrize(("kind", "answer"), ANSWERS)
def test_ids_and_labels_of_the_reference(qwen2, kind, answer):
    record = replace(SEG, kind=kind)
    question = "<image>\nPlease segment liver in abdomen CT."
    ids, labels = encode(qwen2, record, Conversation(question, answer))
    expected = ANSWERS[kind, answer]
    newline = [198] if kind is Kind.VQA else []
    assert ids == INSTRUCTION + expected + newline
    assert labels == [IGNORE] * len(INSTRUCTION) + expected + [IGNORE] * len(newline)


def test_inference_turn(qwen2):
    conversation = Conversation("<image>Please segment liver in abdomen CT.", "[SEG].")
    ids, _ = encode(qwen2, SEG, conversation, prompts=PromptConfig(turn="inference"))
    assert ids[: len(INFERENCE)] == INFERENCE


def test_phrase_marks_are_text_or_special_tokens(qwen2):
    record = replace(SEG, kind=Kind.VQA)
    conversation = Conversation("<image>\nWhat?", "<p> nodule. </p> [SEG]")
    assert 151675 not in encode(qwen2, record, conversation)[0]
    special = encode(qwen2, record, conversation, prompts=PromptConfig(phrase_marks="special"))[0]
    assert special.count(151675) == special.count(151676) == 1


def test_image_tokens_are_repeated_for_tiles_and_written_out_for_frames(qwen2):
    conversation = Conversation("<image>What?", "[SEG].")
    one = encode(qwen2, SEG, conversation)[0]
    builder = SampleBuilder(SampleConfig(), replace(ONE_TOKEN, tokens_per_tile=256), qwen2, 0)
    ids = builder.encode(SEG, conversation, 13)[0].tolist()
    start = one.index(151667)
    assert ids == one[:start] + [151667] * (13 * 256) + one[start + 1 :]
    sequence = replace(SEG, kind=Kind.SEQUENCE, slices=3)
    ids = builder.encode(sequence, conversation, 3)[0].tolist()
    frame = [151665] + [151667] * 256 + [151666]
    block = frame + [198] + frame + [198] + frame
    assert ids[5 : 5 + len(block)] == block and ids[5 + len(block)] != 198


def test_a_cut_that_loses_a_seg_names_the_sample(qwen2):
    conversation = Conversation("<image>\nPlease segment liver in abdomen CT.", "It is [SEG].")
    assert len(encode(qwen2, SEG, conversation, max_tokens=28)[0]) == 28  # [SEG] is the last token left
    with pytest.raises(InputError, match=r"^a has 33 tokens.*max_tokens=27 would lose a \[SEG\]"):
        encode(qwen2, SEG, conversation, max_tokens=27)
    caption = replace(SEG, kind=Kind.CAPTION, masks=())
    assert len(encode(qwen2, caption, Conversation("<image>\nWhat?", "word " * 50), max_tokens=27)[0]) == 27


def test_a_seg_among_the_records_own_words_is_refused(qwen2):
    with pytest.raises(InputError, match=r"^a makes 2 \[SEG\] for 1 masks"):
        encode(qwen2, SEG, Conversation("<image>\nWhat is [SEG]?", "It is [SEG]."))
    region = replace(SEG, kind=Kind.REGION)
    ids, _ = encode(qwen2, region, Conversation("<image>\nWhat?", "[SEG] <vp>"))
    assert not {151674, 151677} & set(ids)


def test_the_text_length_bounds_every_draw_and_is_reached(qwen2):
    for record in (
        SEG,
        replace(SEG, kind=Kind.DISEASE),
        replace(SEG, kind=Kind.SEQUENCE, slices=3),
        replace(SEG, kind=Kind.REPORT, texts=("Nodule",), report="Small."),
    ):
        builder = SampleBuilder(SampleConfig(), SIZES, qwen2, 0)
        asked, answered = prompts.variants(record, CONFIG)
        lengths = [
            len(builder.encode(record, Conversation(question, answer), 3)[0])
            for question in asked
            for answer in answered
        ]
        assert builder.text_length(record) + 3 * SIZES.tokens_per_tile == max(lengths)
