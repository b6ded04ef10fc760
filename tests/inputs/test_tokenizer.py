"""The tokenizer: ids of a real vocabulary, files of every age, and damaged ones."""

import errno
import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import MICRO

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import UNIBIOMED_TOKENS, Tokenizer


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


def test_ids_of_the_real_vocabulary(qwen2):
    for text, ids in IDS.items():
        assert qwen2.encode(text) == ids
        assert qwen2.decode(ids) == text


def test_special_ids(qwen2, byte_tokenizer):
    assert (qwen2.image_context_id, qwen2.seg_id, qwen2.eos_id, qwen2.pad_id) == (
        151667,
        151674,
        151645,
        151643,
    )
    assert (
        byte_tokenizer.image_context_id,
        byte_tokenizer.seg_id,
        byte_tokenizer.eos_id,
        byte_tokenizer.pad_id,
    ) == (280, 287, 258, 256)
    assert (qwen2.vocab_size, byte_tokenizer.vocab_size) == (151679, 292)


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


def test_tokenizer_can_go_to_another_process(byte_tokenizer):
    copy = pickle.loads(pickle.dumps(byte_tokenizer))
    assert copy.encode("liver [SEG]") == byte_tokenizer.encode("liver [SEG]")


@given(text=st.text())
def test_bytes_survive(byte_tokenizer, text):
    normal = byte_tokenizer.backend.normalizer.normalize_str(text)
    assert byte_tokenizer.decode(byte_tokenizer.encode(text)) == normal


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
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=rf"{name} cannot be read \(Permission denied\); change its perm"):
        Tokenizer.from_folder(tmp_path)
