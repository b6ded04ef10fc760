"""Tokenizer, prompt strings, stopping, and the phrases of an answer."""

import errno
import json
import lzma
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import MICRO, QWEN2

from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.phrases import clean_answer, parse_answer, requested_target
from unibiomed_jax.inference.stopping import find_stop
from unibiomed_jax.inputs.prompt import STOP_TEXT, TRAINING_TURN, build_prompt
from unibiomed_jax.inputs.tokenizer import IMAGE_CONTEXT, UNIBIOMED_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    (folder / "tokenizer.json").write_bytes(lzma.decompress((QWEN2 / "tokenizer.json.xz").read_bytes()))
    shutil.copy(QWEN2 / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def qwen2(qwen2_folder) -> Tokenizer:
    return Tokenizer.from_folder(qwen2_folder)


@pytest.fixture(scope="module")
def micro() -> Tokenizer:
    return Tokenizer.from_folder(MICRO)


def old_files(folder: Path, destination: Path) -> None:
    """Write vocab.json and merges.txt as older releases have them, instead of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (destination / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (destination / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    shutil.copy(folder / "tokenizer_config.json", destination)


def internvl_files(folder: Path, destination: Path) -> None:
    """The same tokenizer before UniBiomed's tokens were added."""
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"] = [
        entry for entry in table["added_tokens"] if entry["content"] not in UNIBIOMED_TOKENS
    ]
    (destination / "tokenizer.json").write_text(json.dumps(table))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        key: entry
        for key, entry in config["added_tokens_decoder"].items()
        if entry["content"] not in UNIBIOMED_TOKENS
    }
    (destination / "tokenizer_config.json").write_text(json.dumps(config))


# --- tokenizer ---

IDS = {
    "Hello world": [9707, 1879],
    "Please segment the liver in this CT image.": [5501, 10238, 279, 25506, 304, 419, 18572, 2168, 13],
    "Sure, it is <p> left lung </p> [SEG].": [
        39814, 11, 432, 374, 220, 151675, 2115, 20622, 220, 151676, 220, 151674, 13,
    ],
    "<|im_start|>user\n<img><IMG_CONTEXT></img>\nCan you segment the tumor?<|im_end|>\n<|im_start|>": [
        151644, 872, 198, 151665, 151667, 151666, 198, 6713, 498, 10238, 279, 35154, 30, 151645, 198, 151644,
    ],
    "COVID-19 infection in lung CT": [77963, 12, 16, 24, 18873, 304, 20622, 18572],
    "肺部感染 😀": [100887, 32948, 101304, 90316],
    "I'LL see, it's 12345": [40, 6, 4086, 1490, 11, 432, 594, 220, 16, 17, 18, 19, 20],
    "It is [SEG].<|end|>": [2132, 374, 220, 151674, 15757, 91, 408, 91, 29],
    "It is [SEG]. brain tumor in brain MRI.<|end|>": [
        2132, 374, 220, 151674, 13, 8109, 35154, 304, 8109, 51360, 15757, 91, 408, 91, 29,
    ],
    "liver in abdomen ct<|end|>": [75, 1524, 304, 63672, 20251, 27, 91, 408, 91, 29],
}  # fmt: skip

TRAINING_IDS = [
    27, 91, 872, 91, 397, 151665, 151667, 151666, 198, 5501, 10238, 25506, 304, 63672, 18572, 15757, 91,
    408, 91, 1784, 91, 77091, 91, 397,
]  # fmt: skip
INFERENCE_IDS = [
    27, 91, 872, 91, 397, 151665, 151667, 151666, 5501, 10238, 25506, 304, 63672, 18572, 15757, 91, 408, 91,
    397, 27, 91, 77091, 91, 397,
]  # fmt: skip


def test_ids_of_the_real_vocabulary(qwen2):
    for text, ids in IDS.items():
        assert qwen2.encode(text) == ids
        assert qwen2.decode(ids) == text


def test_special_ids(qwen2, micro):
    assert (qwen2.image_context_id, qwen2.seg_id, qwen2.eos_id, qwen2.pad_id) == (
        151667,
        151674,
        151645,
        151643,
    )
    assert (micro.image_context_id, micro.seg_id, micro.eos_id, micro.pad_id) == (280, 287, 258, 256)
    assert (qwen2.vocab_size, micro.vocab_size) == (151679, 292)


def test_phrase_marks_as_plain_text(qwen2):
    plain = qwen2.with_plain_text("<p>", "</p>")
    ids = plain.encode("<p> no findings in lung. </p> [SEG]<|end|>")
    assert ids == [7926, 29, 902, 14613, 304, 20622, 13, 690, 79, 29, 220, 151674, 27, 91, 408, 91, 29]
    assert plain.encode("<vp></vp>") == [151677, 151678]
    assert plain.decode([151675]) == "<p>"
    assert qwen2.encode("<p>") == [151675]
    assert plain.vocab_size == qwen2.vocab_size


def test_old_files_give_the_same_ids(qwen2_folder, qwen2, tmp_path):
    old_files(qwen2_folder, tmp_path)
    old = Tokenizer.from_folder(tmp_path)
    assert old.vocab_size == qwen2.vocab_size
    for text, ids in IDS.items():
        assert old.encode(text) == ids
        assert old.decode(ids) == text


def test_unibiomed_tokens_are_appended_to_internvl(qwen2_folder, qwen2, tmp_path):
    internvl_files(qwen2_folder, tmp_path)
    with pytest.raises(InputError, match=r"lacks the special tokens \[SEG\], <p>, </p>, <vp>, </vp>"):
        Tokenizer.from_folder(tmp_path)
    extended = Tokenizer.from_folder(tmp_path, add_missing=True)
    assert extended.vocab_size == qwen2.vocab_size
    for text, ids in IDS.items():
        assert extended.encode(text) == ids


def test_saved_tokenizer_reads_back(qwen2, tmp_path):
    qwen2.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (again.eos_id, again.pad_id, again.vocab_size) == (qwen2.eos_id, qwen2.pad_id, qwen2.vocab_size)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (qwen2.eos_id, qwen2.pad_id)
    for text, ids in IDS.items():
        assert again.encode(text) == ids
        assert theirs(text)["input_ids"] == ids


def test_tokenizer_can_go_to_another_process(micro):
    copy = pickle.loads(pickle.dumps(micro))
    assert copy.encode("liver [SEG]") == micro.encode("liver [SEG]")


@given(text=st.text())
def test_bytes_survive(micro, text):
    normal = micro.backend.normalizer.normalize_str(text)
    assert micro.decode(micro.encode(text)) == normal


def test_broken_tokenizer_folders(qwen2_folder, tmp_path):
    with pytest.raises(InputError, match="tokenizer_config.json is missing"):
        Tokenizer.from_folder(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    shutil.copy(qwen2_folder / "tokenizer_config.json", config)
    with pytest.raises(InputError, match="vocab.json is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="merges.txt is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(InputError, match="do not fit"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((qwen2_folder / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(InputError, match="tokenizer.json is truncated or damaged"):
        Tokenizer.from_folder(tmp_path)
    shutil.copy(qwen2_folder / "tokenizer.json", tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)
    config.write_text('{"pad_token": "<|endoftext|>"}')
    with pytest.raises(InputError, match="has no eos_token"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("merges.txt", b"\xff\xfe", "merges.txt is truncated or damaged .*; copy it again"),
        ("merges.txt", b"one\n", "vocab.json and merges.txt that do not fit; copy both"),
        ("vocab.json", b"[]", "vocab.json is not a JSON object; copy it again"),
        ("vocab.json", b'{"a": "b"}', "vocab.json and merges.txt that do not fit; copy both"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is not a JSON object; copy it again"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is truncated or damaged .*; copy it again"),
        ("tokenizer_config.json", b'{"eos_token": {}}', "tokenizer_config.json has no eos_token; copy it"),
        ("tokenizer_config.json", b'{"eos_token": 5}', "tokenizer_config.json has no eos_token; copy it"),
    ]
    + [
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": %b}' % added,
            r"tokenizer_config.json has a damaged added_tokens_decoder \(.*\); copy it again",
        )
        for added in (b"[1]", b'{"x": {}}', b'{"256": "text"}', b'{"256": {"content": 5}}', b"null")
    ],
)
def test_damaged_tokenizer_files_are_named(tmp_path, name, content, reason):
    old_files(MICRO, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"])
def test_unreadable_tokenizer_files_are_named(tmp_path, monkeypatch, name):
    old_files(MICRO, tmp_path)
    if name == "tokenizer.json":
        shutil.copy(MICRO / name, tmp_path)
    read_text = Path.read_text

    def refuse(path, *args, **options):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(InputError, match=rf"{name} cannot be read \(Permission denied\); change its perm"):
        Tokenizer.from_folder(tmp_path)


# --- prompts ---

CASES = {
    "image_abdomen": {
        "text": "<image>Could you describe the abnormality in this image? "
        "Please highlight the region with interleaved segmentation masks.",
        "tiles": 10,
    },
    "image_noseg": {"text": "<image>Describe this image.", "tiles": 9},
    "region_abdomen": {
        "text": "<image>\nWhat is the region1 in the picture? Is region2 normal?",
        "tiles": 10,
        "region_cells": [1, 1],
    },
    "video8": {"text": "<image>Please segment the liver in this video.", "frames": 5},
    "text_only": {
        "text": "<image>What is a CT scan?",
        "past_text": "<|user|>\nHello!<|end|>\n<|assistant|>\nHi.<|end|>\n",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_prompt_equals_the_recorded_one(micro, case):
    recorded = np.load(MICRO / f"{case}.npz")
    prompt = build_prompt(**CASES[case], tokens_per_tile=16)
    assert prompt == str(recorded["input_text"])
    assert micro.encode(prompt) == recorded["input_ids"].tolist()
    assert micro.decode(recorded["generated_ids"]).strip() == str(recorded["prediction"])


def test_prompt_ids_of_the_real_vocabulary(qwen2):
    question = "Please segment liver in abdomen CT."
    training = build_prompt(f"<image>\n{question}", tiles=1, tokens_per_tile=1, turn=TRAINING_TURN)
    assert qwen2.encode(training) == TRAINING_IDS
    assert qwen2.encode(build_prompt(f"<image>{question}", tiles=1, tokens_per_tile=1)) == INFERENCE_IDS


def test_later_turn(micro):
    first = build_prompt("<image>Is there a tumor?", tiles=3, tokens_per_tile=16)
    past = first + "Yes.<|end|>"
    second = build_prompt("Where?", tiles=3, tokens_per_tile=16, past_text=past)
    assert second == past + "<|user|>\nWhere?<|end|>\n<|assistant|>\n"
    assert micro.encode(second).count(micro.image_context_id) == 48


def test_later_turn_after_regions():
    first = build_prompt("<image>\nCompare.", tiles=1, tokens_per_tile=16, region_cells=[2, 3])
    second = build_prompt(
        "Why?", tiles=1, tokens_per_tile=16, region_cells=[2, 3], past_text=first + "Same.<|end|>"
    )
    assert second.count(IMAGE_CONTEXT) == 21


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1).filter(
    str.strip
)


@given(plain_text, plain_text, st.integers(1, 13), st.lists(st.integers(1, 16), max_size=4))
@settings(max_examples=50)
def test_number_of_image_tokens(micro, before, after, tiles, cells):
    prompt = build_prompt(before + "<image>" + after, tiles=tiles, tokens_per_tile=16, region_cells=cells)
    assert prompt.startswith("<|user|>\n" + before) and prompt.endswith(after + "<|end|>\n<|assistant|>\n")
    assert micro.encode(prompt).count(micro.image_context_id) == 16 * tiles + sum(cells)


@given(plain_text, st.integers(1, 8))
@settings(max_examples=50)
def test_number_of_frame_tokens(micro, text, frames):
    prompt = build_prompt("<image>" + text, frames=frames, tokens_per_tile=16)
    assert micro.encode(prompt).count(micro.image_context_id) == 16 * frames
    assert prompt.count("</img>\n<img>") == frames - 1


PAST = "<|user|>\n<img>" + IMAGE_CONTEXT * 16 + "</img>Hello<|end|>\n<|assistant|>\nHi.<|end|>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "The prompt is empty"),
        ({"text": " \n"}, "The prompt is empty"),
        ({"text": "<image>\n", "tiles": 1}, "The prompt is empty"),
        ({"text": "<image>a<image>", "tiles": 1}, "has <image> 2 times"),
        ({"text": "<image>a<image>"}, "has <image> 2 times"),
        ({"text": "a", "tiles": 1}, "has no <image>"),
        ({"text": "a", "frames": 2}, "has no <image>"),
        ({"text": "<image>a", "tiles": 1, "frames": 2}, "Both an image and a frame sequence"),
        ({"text": "<image>a <IMG_CONTEXT>", "tiles": 1}, "contains <IMG_CONTEXT>"),
        ({"text": "<image>a </img>", "tiles": 1}, "contains </img>"),
        ({"text": "a", "past_text": "<image>b"}, "past_text contains <image>"),
        ({"text": "a", "tiles": 1, "past_text": "<image>b"}, "past_text contains <image>"),
        ({"text": "<image>a", "tiles": 1, "past_text": PAST}, "belongs to the first turn"),
        ({"text": "a", "past_text": PAST}, "give the same image again"),
        ({"text": "a", "tiles": 2, "past_text": PAST}, "holds 16 image tokens but .* make 32"),
        ({"text": "a", "tiles": 1, "past_text": "Hello"}, "holds 0 image tokens but .* make 16"),
        ({"text": "a", "tiles": 1, "past_text": PAST, "region_cells": [1]}, "introduced in a later turn"),
        ({"text": "<image>a", "region_cells": [1]}, "without an image"),
        ({"text": "<image>a", "frames": 2, "region_cells": [1]}, "without an image"),
    ],
)
def test_unusable_prompts(arguments, message):
    with pytest.raises(InputError, match=message):
        build_prompt(**arguments, tokens_per_tile=16)


# --- stopping ---


def reference_stop(tokenizer: Tokenizer, ids: list[int]) -> int | None:
    """Decode every prefix, as the original implementation does."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end]).replace("\r", "").replace("\n", "")
        if ids[end - 1] == tokenizer.eos_id or text.endswith(STOP_TEXT):
            return end
    return None


PIECES = [
    "<|end|>",
    "<|e",
    "nd|>",
    "<|",
    "end",
    "|>",
    "\n",
    "\r\n",
    ".",
    " ",
    "é",
    "肺",
    "[SEG]",
    "<|end|",
    ">\n\n",
    "🫁",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.integers(1, 5))
@settings(max_examples=300)
def test_stop_equals_decoding_every_prefix(micro, qwen2, pieces, block):
    for tokenizer in (micro, qwen2):
        ids = [token for piece in pieces for token in tokenizer.encode(piece)]
        expected = reference_stop(tokenizer, ids)
        assert find_stop(tokenizer, ids) == expected
        # The same, block by block, as generation does.
        found = None
        for start in range(0, len(ids), block):
            found = find_stop(tokenizer, ids[: start + block], start)
            if found is not None:
                break
        assert found == expected


@given(st.lists(st.integers(0, 291), max_size=40))
@settings(max_examples=100)
def test_stop_on_any_bytes(micro, ids):
    assert find_stop(micro, ids) == reference_stop(micro, ids)


def test_stop_through_newlines(micro):
    ids = micro.encode("<|e\n\n\n\n\n\n\n\n\n\n\n\nnd|\r>")
    assert find_stop(micro, ids) == len(ids)
    assert find_stop(micro, ids[:-1]) is None


def test_stop_of_the_recorded_answers(micro):
    stops = {case: find_stop(micro, np.load(MICRO / f"{case}.npz")["generated_ids"]) for case in CASES}
    assert stops.pop("image_abdomen") == 21
    assert set(stops.values()) == {None}


# --- answers ---


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
