"""`unibiomed predict`: what it leaves on disk, and one clear sentence for whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import GOLDEN
from pycocotools import mask as coco

from unibiomed_jax import InputError, Request, UniBiomed
from unibiomed_jax.commands.predict import PredictOptions, _sources, predict
from unibiomed_jax.config import precision

pytestmark = pytest.mark.slow

CHECKPOINT = GOLDEN / "micro" / "checkpoint"
IMAGE = GOLDEN / "images" / "CT_abdomen.png"
PROMPT = "<image>Please segment the liver."
SAID = "<p> the liver </p> [SEG]. Also [SEG].<|end|>"


@pytest.fixture(scope="module")
def model() -> UniBiomed:
    """The micro model, which is made to say two [SEG] whatever it is asked."""
    model = UniBiomed.from_pretrained(CHECKPOINT)
    forced = dict(enumerate(model.tokenizer.encode(SAID)))
    answer = model.predict_batch

    def predict_batch(requests, **options):
        dictated = [Request(r.prompt, r.image, r.regions, r.boxes, r.history, forced) for r in requests]
        return answer(dictated, **options)

    model.predict_batch = predict_batch
    return model


@pytest.fixture
def loaded(model, monkeypatch):
    monkeypatch.setattr(UniBiomed, "from_pretrained", lambda *args, **kwargs: model)


def options(source: Path, out: Path, **changes) -> PredictOptions:
    return PredictOptions(source, **{"prompt": PROMPT, "checkpoint": CHECKPOINT, "out": out, **changes})


@pytest.mark.parametrize(
    ("name", "units", "vision"),
    [("auto", "vector", "float32"), ("fast", "vector", "bfloat16"), ("fast", None, "float32")],
)
def test_the_record_says_in_which_formats_it_was_computed(monkeypatch, tmp_path, name, units, vision):
    monkeypatch.setattr(precision, "bfloat16_units", lambda: units)
    assert predict(options(IMAGE, tmp_path / "out", precision=name, max_new_tokens=2)) == 0
    answer = json.loads((tmp_path / "out" / IMAGE.name / "answer.json").read_text())
    assert answer["precision"]["vision"] == vision and answer["precision"]["language"] == "float32"
    assert answer["request"]["precision"] == name


def test_an_image_leaves_json_masks_and_overlay(loaded, tmp_path):
    assert predict(options(IMAGE, tmp_path / "out")) == 0
    folder = tmp_path / "out" / IMAGE.name
    answer = json.loads((folder / "answer.json").read_text())
    assert answer["prompt"] == PROMPT and answer["text"] == SAID
    assert [segment["phrase"] for segment in answer["segments"]] == ["the liver", "Also"]
    assert "research use only" in answer["notice"]
    assert answer["preprocessing"][0]["width"] == 410
    assert answer["preprocessing"][0]["steps"][-2:] == [
        "stretched and cut into 3x3 tiles of 112x112 pixels for the words, with the whole as one more",
        "stretched to 256x256 pixels for the masks",
    ]
    assert answer["seconds"].keys() >= {"encode tiles", "prefill", "decode", "encode image", "decode masks"}
    assert len(answer["checkpoint"]) == 64 and answer["versions"]["jax"]
    mask = np.asarray(Image.open(folder / "mask_0_the_liver.png")) > 0
    rle = answer["segments"][0]["mask"]
    assert (coco.decode({**rle, "counts": rle["counts"].encode()}) == mask).all()
    assert mask.sum() == answer["segments"][0]["pixels"]
    assert Image.open(folder / "overlay.png").size[0] >= 410


def test_failed_images_are_named_and_the_others_done_once(loaded, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    shutil.copy(IMAGE, source / "sub" / "good.png")
    (source / "cut.png").write_bytes(IMAGE.read_bytes()[:5000])
    (source / "text.png").write_text("not an image")
    (source / "notes.txt").write_text("left alone")
    assert predict(options(source, out)) == 1
    said = capsys.readouterr()
    assert "cut.png" in said.err and "truncated" in said.err and "text.png" in said.err
    assert "1 answered, 2 failed" in said.out
    assert sorted(p.name for p in out.rglob("answer.json")) == ["answer.json"]
    written = (out / "sub" / "good.png" / "answer.json").stat().st_mtime_ns
    assert predict(options(source, out)) == 1
    assert "1 of 3 already answered" in capsys.readouterr().out
    assert (out / "sub" / "good.png" / "answer.json").stat().st_mtime_ns == written
    assert predict(options(source, out, prompt="<image>Where is it?")) == 1
    assert (out / "sub" / "good.png" / "answer.json").stat().st_mtime_ns != written


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_new_tokens": -1}, "--max-new-tokens -1"),
        ({"conditioning": (0,)}, "add --volume"),
        ({"region": (IMAGE,)}, "--region belongs to one image"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_loading(tmp_path, changes, reason):
    for name in ("a.png", "b.png"):
        shutil.copy(IMAGE, tmp_path / name)
    with pytest.raises(InputError, match=reason):
        predict(options(tmp_path, tmp_path / "out", checkpoint=tmp_path / "none", **changes))


def test_only_the_same_question_about_the_same_file_is_done(loaded, tmp_path, capsys):
    source, out = tmp_path / "slice [axial].png", tmp_path / "out"
    shutil.copy(IMAGE, source)
    for changes in ({}, {"max_new_tokens": 30}, {"hide_absent": True, "max_new_tokens": 30}):
        assert predict(options(source, out, **changes)) == 0
        assert "1 answered" in capsys.readouterr().out
        assert predict(options(source, out, **changes)) == 0
        assert "0 answered" in capsys.readouterr().out
    Image.open(IMAGE).rotate(180).save(source)
    assert predict(options(source, out, hide_absent=True, max_new_tokens=30)) == 0
    assert "1 answered" in capsys.readouterr().out


def test_answers_inside_the_folder_are_not_asked_about(loaded, tmp_path, capsys):
    shutil.copy(IMAGE, tmp_path / "a.png")
    for said in ("1 answered", "0 answered"):
        assert predict(options(tmp_path, tmp_path / "out")) == 0
        assert said in capsys.readouterr().out


def test_a_group_that_fails_is_named_and_the_others_done(loaded, model, tmp_path, capsys, monkeypatch):
    for name in ("a [x].png", "b.png"):
        shutil.copy(IMAGE, tmp_path / name)
    answer, calls = model.predict_batch, []

    def fail_once(requests, **rest):
        calls.append(requests)
        if len(calls) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return answer(requests, **rest)

    monkeypatch.setattr(model, "predict_batch", fail_once)
    assert predict(options(tmp_path, tmp_path / "out")) == 1
    captured = capsys.readouterr()
    assert "1 answered, 1 failed" in captured.out
    assert "a [x].png" in captured.err and "out of memory" in captured.err


def test_slices_are_ordered_by_number_and_those_of_subfolders_left_out(tmp_path):
    for name in ("slice10.png", "slice2.png", "slice1.png", "masks/slice1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(IMAGE, tmp_path / name)
    sources, _ = _sources(options(tmp_path, tmp_path / "out", volume=True))
    (slices,) = sources.values()
    assert [path.name for path in slices] == ["slice1.png", "slice2.png", "slice10.png"]
    assert len(_sources(options(tmp_path, tmp_path / "out"))[0]) == 4


def test_a_volume_leaves_a_mask_and_an_overlay_a_slice(loaded, tmp_path):
    source = tmp_path / "ct"
    source.mkdir()
    for i in range(3):
        Image.open(IMAGE).convert("RGB").crop((i, i, 200 + i, 180 + i)).save(source / f"{i}.png")
    assert predict(options(source, tmp_path / "out", volume=True, conditioning=(1,))) == 0
    folder = tmp_path / "out" / "ct"
    assert len(list((folder / "mask_0_the_liver").iterdir())) == 3
    assert len(list((folder / "overlay").iterdir())) == 3
    answer = json.loads((folder / "answer.json").read_text())
    assert len(answer["segments"][0]["mask"]) == 3
    steps = [record["steps"] for record in answer["preprocessing"]]
    assert ["stretched to 112x112 pixels for the words" in done for done in steps] == [False, True, False]
    assert all(done[-1] == "stretched to 256x256 pixels for the masks" for done in steps)


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(
    loaded, model, tmp_path, capsys, monkeypatch
):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(IMAGE, source / name)
    replace, answered = os.replace, []

    def full(old, new):
        if Path(new).name == "b.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    predict_batch = model.predict_batch
    monkeypatch.setattr(
        model, "predict_batch", lambda *args, **kw: answered.append(1) or predict_batch(*args, **kw)
    )
    assert predict(options(source, out)) == 1
    captured = capsys.readouterr()
    assert "1 answered, 2 failed" in captured.out and "research use" in captured.out
    assert "b.png: " in captured.err and "c.png: " in captured.err
    assert captured.err.count("b.png is full; free some space and run again") == 2
    assert len(answered) == 2  # c.png was not even asked about
    assert [path.name for path in out.iterdir()] == ["a.png"]


def test_an_answer_that_cannot_be_written_fails_alone(loaded, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("b.png", "c.png"):
        shutil.copy(IMAGE, source / name)
    (out / "b.png").write_bytes(b"a mask of somebody else")
    assert predict(options(source, out)) == 1
    captured = capsys.readouterr()
    assert "1 answered, 1 failed" in captured.out
    assert "b.png: " in captured.err and "something else than an answer" in " ".join(captured.err.split())
    assert (out / "b.png").read_bytes() == b"a mask of somebody else"
    assert (out / "c.png" / "answer.json").is_file()


def test_what_is_not_an_answer_is_never_replaced(loaded, tmp_path, capsys):
    kept = tmp_path / "out" / IMAGE.name / "ground_truth.png"
    kept.parent.mkdir(parents=True)
    shutil.copy(IMAGE, kept)
    assert predict(options(IMAGE, tmp_path / "out", overwrite=True)) == 1
    assert "choose another --out" in " ".join(capsys.readouterr().err.split())
    assert kept.read_bytes() == IMAGE.read_bytes()


def test_an_old_answer_stays_where_the_new_one_cannot_be_put(loaded, tmp_path, monkeypatch):
    folder = tmp_path / "out" / IMAGE.name
    assert predict(options(IMAGE, tmp_path / "out")) == 0
    replace = os.replace

    def refuse(old, new):
        if ".partial-" in old.name and not old.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuse)
    assert predict(options(IMAGE, tmp_path / "out", overwrite=True)) == 1
    assert (folder / "answer.json").is_file() and (folder / "overlay.png").is_file()
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "<image> "}, "prompt is empty"),
        ({"prompt": "<image>Is <image> alike?"}, "2 times"),
        ({"prompt": "Please segment the liver."}, "has no <image>"),
        ({"prompt": "<image>" + "a" * 33_000}, "context holds 32768"),
        ({"region": (GOLDEN / "images" / "missing.png",)}, "does not exist"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(loaded, tmp_path, capsys, changes, reason):
    assert predict(options(IMAGE, tmp_path / "out", **changes)) == 1
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_regions_must_fit_the_image(loaded, tmp_path, capsys):
    Image.new("L", (100, 100), 255).save(tmp_path / "small.png")
    Image.new("L", (410, 410), 0).save(tmp_path / "empty.png")
    for name, reason in (("small.png", "resize the mask"), ("empty.png", "is empty")):
        assert predict(options(IMAGE, tmp_path / "out", region=(tmp_path / name,))) == 1
        assert reason in " ".join(capsys.readouterr().err.split())


def test_slices_of_different_sizes_are_refused(loaded, tmp_path, capsys):
    source = tmp_path / "ct"
    source.mkdir()
    Image.new("RGB", (100, 100)).save(source / "0.png")
    Image.new("RGB", (100, 90)).save(source / "1.png")
    assert predict(options(source, tmp_path / "out", volume=True)) == 1
    assert "resample all frames to one size" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("source", "checkpoint", "reason"),
    [
        ("nowhere.png", CHECKPOINT, "nowhere.png does not exist"),
        (".", CHECKPOINT, "holds no image"),
        (IMAGE, "no_checkpoint", "no_checkpoint"),
    ],
)
def test_the_command_fails_with_one_sentence(unibiomed, source, checkpoint, reason):
    options = ["--prompt", PROMPT, "--checkpoint", str(checkpoint), "--out", "out"]
    run = unibiomed("predict", str(source), *options)
    assert run.returncode == 2
    assert reason in run.stderr and "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
