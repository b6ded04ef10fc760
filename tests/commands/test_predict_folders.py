"""`unibiomed predict` on folders as people have them: odd names, other files, a stop in the middle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import MICRO

from unibiomed_jax import InputError, Request, UniBiomed
from unibiomed_jax.commands import predict as command
from unibiomed_jax.commands.predict import PredictOptions, predict
from unibiomed_jax.commands.run import INTERRUPTED, run
from unibiomed_jax.inputs.images import open_image

pytestmark = pytest.mark.slow

SAID = "<p> the liver </p> [SEG].<|end|>"
PROMPT = "<image>Please segment the liver."


@pytest.fixture(scope="module")
def model() -> UniBiomed:
    return UniBiomed.from_pretrained(MICRO)


@pytest.fixture
def loaded(model, monkeypatch):
    """The micro model, which is made to say one [SEG] whatever it is asked."""
    forced = dict(enumerate(model.tokenizer.encode(SAID)))
    start = model._start

    def dictated(requests, *settings):
        return start([Request(r.prompt, r.image, r.regions, forced=forced) for r in requests], *settings)

    monkeypatch.setattr(model, "_start", dictated)
    monkeypatch.setattr(UniBiomed, "from_pretrained", lambda *args, **kwargs: model)
    return model


def options(source: Path, out: Path, **changes) -> PredictOptions:
    return PredictOptions(source, **{"prompt": PROMPT, "checkpoint": MICRO, "out": out, **changes})


def picture(path: Path | bytes, format: str | None = None) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, format or "PNG")


def answered(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.rglob("answer.json"))


def test_what_is_left_out_is_counted_and_named(loaded, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for name, kind in (("a.png", "PNG"), ("b.jfif", "JPEG"), ("c.PGM", "PPM")):
        picture(source / name, kind)
    for name in ("scan.dcm", "scan.nii.gz", "notes.txt"):
        (source / name).write_text("something else")
    assert predict(options(source, tmp_path / "out")) == 1
    assert answered(tmp_path / "out") == ["a.png", "b.jfif", "c.PGM"]
    captured = capsys.readouterr()
    said = " ".join(captured.out.split())
    assert "1 of them are DICOM or volumes; ask about them with `unibiomed study`" in captured.err
    assert "3 answered, 0 failed" in said
    assert "Left out, 3 that this command does not read as images: notes.txt, scan.dcm" in said


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "no_preamble", "scan.nii.gz"])
def test_scans_are_sent_to_the_command_for_them(tmp_path, name):
    testing = pytest.importorskip("pydicom.data")
    path = tmp_path / "scan" / name
    path.parent.mkdir()
    if name.endswith("dcm"):  # the first of them begins as a TIFF file does
        shutil.copy(testing.get_testdata_file(name), path)
    elif name == "no_preamble":
        shutil.copy(testing.get_testdata_file("ExplVR_LitEndNoMeta.dcm"), path)
    else:
        path.write_bytes(b"a volume")
    for given in (path, path.parent):
        with pytest.raises(InputError, match="ask about it with `unibiomed study`"):
            predict(options(given, tmp_path / "out"))
    if name != "no_preamble":
        with pytest.raises(InputError, match=rf"{name} is DICOM .*open_study and ask_study"):
            open_image(path)


@pytest.mark.parametrize("volume", [False, True])
def test_hidden_files_and_folders_are_passed_over(loaded, tmp_path, capsys, volume):
    source = tmp_path / "in"
    (source / ".thumbnails").mkdir(parents=True)
    for number in range(3):
        picture(source / f"{number}.png")
        (source / f"._{number}.png").write_bytes(b"\0\5\x16\7 metadata of another system")
    picture(source / ".thumbnails" / "small.png")
    (source / ".DS_Store").write_bytes(b"\0")
    assert predict(options(source, tmp_path / "out", volume=volume)) == 0
    said = capsys.readouterr().out
    assert "Left out" not in said and "0 failed" in said
    assert answered(tmp_path / "out") == (["in"] if volume else ["0.png", "1.png", "2.png"])


def test_one_odd_name_does_not_stop_the_others(loaded, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    names = [b"a.png", b"caf\xe9.png", b"line\nbreak.png", "ñ[red]😀.png".encode(), b"z.png"]
    for name in names:
        picture(os.path.join(os.fsencode(source), name))
    (source / "broken\udce9.png").write_bytes(b"no image")
    assert run(lambda: predict(options(source, tmp_path / "out"))) == 1
    printed = capsys.readouterr()
    assert "5 answered, 1 failed" in " ".join(printed.out.split())
    assert "broken\\xe9.png" in printed.err and "Traceback" not in printed.err
    found = sorted(os.fsencode(path.parent.name) for path in (tmp_path / "out").rglob("answer.json"))
    assert found == sorted(names)
    for path in (tmp_path / "out").rglob("answer.json"):
        sources = [read["source"] for read in json.loads(path.read_bytes())["preprocessing"]]
        assert all(source.encode() for source in sources)
    assert run(lambda: predict(options(source, tmp_path / "out"))) == 1
    assert "5 of 6 already answered" in " ".join(capsys.readouterr().out.split())


def test_answers_inside_the_folder_are_not_asked_about(loaded, tmp_path, capsys):
    picture(tmp_path / "a.png")
    for _ in range(2):
        assert predict(options(tmp_path, tmp_path / "answers")) == 0
    assert answered(tmp_path / "answers") == ["a.png"]
    capsys.readouterr()
    assert predict(options(tmp_path, tmp_path / "others", prompt="<image>And the liver?")) == 0
    assert "Left out, 1 that this command does not read as images: answer.json." in capsys.readouterr().out
    assert answered(tmp_path / "others") == ["a.png"]


def test_linked_folders_are_named(loaded, tmp_path, capsys):
    picture(tmp_path / "in.png")
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "elsewhere").mkdir()
    picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    assert predict(options(tmp_path / "in", tmp_path / "out")) == 0
    assert answered(tmp_path / "out") == ["a.png"] and "not read as images: link." in capsys.readouterr().out


def test_answers_need_a_folder_of_their_own(loaded, tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="is where the images lie; give the answers another folder"):
        predict(options(tmp_path, tmp_path))


def test_a_stop_says_how_far_it_came_and_the_same_command_goes_on(loaded, tmp_path, capsys, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        picture(source / f"{number}.png")
    looks = loaded._looks
    asked = []

    def interrupted(answering, tokens):
        asked.append(answering)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return looks(answering, tokens)

    monkeypatch.setattr(loaded, "_looks", interrupted)
    assert run(lambda: predict(options(source, tmp_path / "out"))) == INTERRUPTED
    said = capsys.readouterr()
    assert "Stopped; 1 of 3 answered, the same command goes on." in " ".join(said.err.split())
    assert "Traceback" not in said.err and answered(tmp_path / "out") == ["0.png"]
    assert not [path for path in (tmp_path / "out").iterdir() if "partial" in path.name]
    assert predict(options(source, tmp_path / "out")) == 0
    assert answered(tmp_path / "out") == ["0.png", "1.png", "2.png"]


def test_an_image_is_read_before_its_turn_only_where_there_is_an_answer(loaded, tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(2):
        picture(source / f"{number}.png")
    assert predict(options(source / "0.png", tmp_path / "out")) == 0
    read = []
    settings = command._settings

    def watched(options, paths):
        read.append([path.name for path in paths])
        return settings(options, paths)

    monkeypatch.setattr(command, "_settings", watched)
    loading = []
    monkeypatch.setattr(command, "_answer", lambda *_: loading.append(list(read)) or iter(()))
    predict(options(source, tmp_path / "out"))
    assert loading == [[["0.png"]]]


def test_words_are_shown_as_they_come(loaded, tmp_path, capsys):
    picture(tmp_path / "a.png")
    assert predict(options(tmp_path / "a.png", tmp_path / "out", stream=True)) == 0
    assert SAID in "".join(capsys.readouterr().out.splitlines())
    assert json.loads((tmp_path / "out" / "a.png" / "answer.json").read_text())["text"] == SAID


def test_how_words_are_drawn_is_kept_with_the_answer(loaded, tmp_path, capsys):
    picture(tmp_path / "a.png")
    for changes in ({"temperature": 0.7}, {"temperature": 0.7, "seed": 3}, {"max_masks": 1}, {}):
        assert predict(options(tmp_path / "a.png", tmp_path / "out", **changes)) == 0
        assert "1 answered" in capsys.readouterr().out
        request = json.loads((tmp_path / "out" / "a.png" / "answer.json").read_text())["request"]
        assert request.items() >= changes.items()
        assert predict(options(tmp_path / "a.png", tmp_path / "out", **changes)) == 0
        assert "already answered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "<image>\udce9"}, r"--prompt '<image>\\\\xe9' is no valid text"),
        ({"seed": 3}, "--top-p and --seed belong to words that are drawn; add --temperature"),
        ({"max_masks": 0}, "--max-masks 0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 is impossible; give a number above 0"),
    ],
)
def test_options_that_cannot_be_meant(loaded, tmp_path, changes, reason):
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=reason):
        predict(options(tmp_path / "a.png", tmp_path / "out", **changes))


def test_a_folder_without_images_says_what_would_be_one(loaded, tmp_path):
    shutil.copy(MICRO / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds no image \(.*\.jpg.*\.png.*\); check the folder"):
        predict(options(tmp_path, tmp_path / "out"))
