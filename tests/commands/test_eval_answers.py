"""`unibiomed eval --checkpoint`: which records are asked, what is kept of a run, and what its page shows."""

import json
import shutil
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from places import MICRO
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax import UniBiomed
from unibiomed_jax.commands.eval.compare import compare
from unibiomed_jax.commands.eval.options import CompareOptions, EvalOptions
from unibiomed_jax.commands.eval.run import evaluate
from unibiomed_jax.commands.eval.score import CONDITIONING
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.answering import Asker, resume
from unibiomed_jax.evaluation.own_format import read_own_format
from unibiomed_jax.evaluation.readers import read_records
from unibiomed_jax.evaluation.records import (
    Sample,
    decode_masks,
    encode_masks,
    read_samples,
    samples_file,
    write_samples,
)

# What the model is made to say: the micro checkpoint has learned nothing.
SAID = "a [SEG] b"


@pytest.fixture(scope="module")
def model():
    return UniBiomed.from_pretrained(MICRO, precision=FLOAT32)


@pytest.fixture
def asked(model, monkeypatch):
    """The questions of every call of the model, which says SAID to each."""
    calls = []
    ids = model.tokenizer.encode(SAID)
    predict = UniBiomed.predict_batch

    def told(self, requests, **options):
        calls.append([request.prompt for request in requests])
        forced = dict(enumerate([*ids, model.tokenizer.eos_id]))
        return predict(self, [replace(request, forced=forced) for request in requests], **options)

    monkeypatch.setattr(UniBiomed, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(UniBiomed, "predict_batch", told)
    return calls


@pytest.fixture
def data(tmp_path):
    """Five images with a target and a region each; one image is missing, one mask is of another size."""
    root = tmp_path / "liver"
    for number in range(5):
        save_picture(root / "test" / f"{number}.png", seed=number)
        save_square(root / "test_mask" / f"{number}_liver.png", corner=(number, number))
    save_square(root / "test_mask" / "4_liver.png", size=(60, 31))
    table = coco_table(5)
    for image in table["images"]:
        image |= {"patient": f"p{image['id']}", "spacing": [0.5, 0.5], "width": 60, "height": 30}
    write_table(root / "test.json", table)
    write_table(root / "test_region.json", table)
    (root / "test" / "3.png").unlink()
    return root


def options(data, out, **more):
    return EvalOptions(out, checkpoint=MICRO, data=data, max_new_tokens=24, batch_size=2, **more)


@pytest.mark.slow
def test_a_run_from_images_to_a_page(data, asked, tmp_path, capsys):
    out = tmp_path / "run"
    assert evaluate(options(data, out)) == 1
    assert "6 answered, 4 not" in capsys.readouterr().out
    assert list(map(len, asked)) == [2, 2, 2]  # the last ones of both tasks together
    samples = read_samples(samples_file(out, "seg2d"), "seg2d")
    assert [sample.doc_id for sample in samples] == [f"{number}_liver.png" for number in range(5)]
    first, missing, wrong = samples[0], samples[3], samples[4]
    assert first.question == "<image>Please segment Liver in abdomen CT."
    assert (first.response, first.prediction) == (f"{SAID}<|im_end|>", "a b")
    assert decode_masks(first.masks, "")[0].shape == (30, 60) and len(first.object_scores) == 1
    assert first.spacing == (0.5, 0.5) and first.patient == "p0" and first.image == "test/0.png"
    assert "3.png" in missing.reason and "60x31" in wrong.reason.replace(" ", "")
    content = json.loads((out / "results.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert content["checkpoint"] == config["checkpoint"] and content["data"] == config["data"]
    found = {result["task"]: result for result in content["results"]}
    assert found["seg2d"]["numbers"]["n"] == 3 and found["region"]["numbers"]["n"] == 3
    assert set(found["seg2d"]["unscored"]) == {"3_liver.png", "4_liver.png"}
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg") == 3 * 2 + 3  # truth and answer; what a region shows
    links = Links()
    links.feed(page)
    assert links.found and all(link.startswith(("#", "data:")) for link in links.found)
    assert "<script" not in page and "@import" not in page and "qualified expert must review" in page
    assert "Please segment Liver in abdomen CT." in page and "2 not scored" in page


class Links(HTMLParser):
    """All that a page could load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_asks_what_failed_again(data, asked, tmp_path, capsys):
    out = tmp_path / "run"
    evaluate(options(data, out, mode="infer", task=("seg2d",)))
    assert not (out / "results.json").exists()
    path = samples_file(out, "seg2d")
    whole = path.read_bytes().split(b"\n")
    path.write_bytes(whole[0] + b"\n" + whole[1][:40])  # killed within a line
    part = path.with_name(path.name + ".part1")
    part.write_bytes(whole[2] + b"\n" + whole[3][:9])  # and so was another process
    shutil.copy(data / "test" / "0.png", data / "test" / "3.png")
    asked.clear()
    capsys.readouterr()
    assert evaluate(options(data, out, mode="infer", task=("seg2d",))) == 1
    assert "2 of 5 already answered" in capsys.readouterr().out
    assert asked == [["<image>Please segment Liver in abdomen CT."] * 2]  # 1 and 3
    assert path.read_bytes().split(b"\n")[:3] == whole[:3] and not part.exists()
    assert [s.reason is None for s in read_samples(path, "seg2d")] == [True] * 4 + [False]
    save_square(data / "test_mask" / "4_liver.png")
    assert evaluate(options(data, out, task=("seg2d",))) == 0
    assert len(asked) == 2
    # The truth of an image is another one now: it is asked again, and no other.
    save_square(data / "test_mask" / "2_liver.png", corner=(30, 10))
    assert evaluate(options(data, out, task=("all",), mode="infer")) == 0
    assert [len(call) for call in asked[2:]] == [2, 2, 2]


def test_a_run_has_one_model(data, asked, tmp_path):
    evaluate(options(data, tmp_path, task=("region",), mode="infer"))
    with pytest.raises(InputError, match="max_new_tokens 24, not 25; choose another --out"):
        evaluate(replace(options(data, tmp_path, task=("region",)), max_new_tokens=25))


def test_a_run_has_one_dataset(data, asked, tmp_path):
    """Answers about one are not dropped for those about another."""
    out = tmp_path / "run"
    evaluate(options(data, out, task=("region",), mode="infer"))
    before = samples_file(out, "region").read_bytes()
    with pytest.raises(InputError, match=r"with the datasets \[\], not \['liver'\]; choose another --out"):
        evaluate(options(data, out, task=("region",), datasets=("liver",), mode="infer"))
    other = shutil.copytree(data, tmp_path / "other")
    with pytest.raises(InputError, match="with the folder .*liver, not .*other; choose another --out"):
        evaluate(options(other, out, task=("region",), mode="infer"))
    assert samples_file(out, "region").read_bytes() == before


def test_an_answer_outlives_a_truth_that_cannot_be_read(tmp_path):
    """As masks on a disk that is away for one call."""
    truth = encode_masks([np.ones((2, 2), bool)])
    answered = Sample("seg2d", "1", "what?", truth_masks=truth, response="this")
    write_samples(samples_file(tmp_path, "seg2d"), [answered])
    away = replace(answered, truth_masks=(), response=None, reason="cannot be read")
    assert resume(tmp_path, [away]) == {"seg2d": {"1"}}
    assert read_samples(samples_file(tmp_path, "seg2d"), "seg2d") == [answered]
    assert resume(tmp_path, [replace(away, question="where?")]) == {"seg2d": set()}


@pytest.mark.slow
def test_two_runs_are_compared_on_a_page(data, asked, tmp_path):
    for name in ("first", "second"):
        evaluate(options(data, tmp_path / name, task=("seg2d",)))
    compare(CompareOptions(tmp_path / "first", tmp_path / "second", page=tmp_path / "compare.html"))
    page = (tmp_path / "compare.html").read_text()
    assert "Liver in abdomen CT." in page and "+0.0000" in page and "qualified expert" in page


def test_every_task_of_the_own_format(volumes, findings):
    (volume,) = read_own_format(volumes, "train", ["seg3d"])
    assert volume.question == "<image>Please segment Lung tumor in chest CT."
    assert len(volume.slices) == 14 and volume.image == "v1" and volume.doc_id == "v1/Lung tumor in chest CT."
    (truth,) = decode_masks(volume.truth_masks, "")
    assert [piece.any() for piece in truth] == [False, *[True] * 12, False]
    reports = read_own_format(findings, "train", ["report"])
    answers = {sample.doc_id: sample.answer for sample in reports}
    assert answers["train/0.png[a]"].startswith("Nodule. ") and "5 mm nodule" in answers["train/0.png[a]"]
    questions = read_own_format(findings, "train", ["gvqa"])
    assert {len(sample.truth_masks) for sample in questions} == {1, 2}
    assert any(not np.any(decode_masks(sample.truth_masks, "")[0]) for sample in questions)
    assert questions == read_own_format(findings, "train", ["gvqa"])


def test_a_region_of_another_size_has_a_reason(data, model):
    """A table may not say the sizes of its images."""
    region = encode_masks([np.ones((40, 70), bool)])
    sample = Sample("region", "0_liver.png", "<image>\n?", image="test/0.png", truth_masks=region)
    (asked,) = Asker(model, data, batch_size=1, max_new_tokens=2).ask([sample])
    assert asked.reason == (
        "0_liver.png is a mask of 70x40 pixels, its image test/0.png has 60x30; correct one of them."
    )


@pytest.mark.parametrize("conditioning", ["first", "target"])
def test_slices_that_a_volume_is_answered_from(volumes, model, conditioning):
    (volume,) = read_own_format(volumes, "train", ["seg3d"])
    asker = Asker(model, volumes, batch_size=1, max_new_tokens=2, conditioning=conditioning)
    seen = asker._open_volume(volume).conditioning
    most = model.config.sam2.max_conditioning_frames
    assert len(seen) == most and (seen == tuple(range(most))) == (conditioning == "first")
    assert conditioning == "first" or set(seen) <= set(range(1, 13))


def test_a_page_shows_images_beside_a_table(data, tmp_path):
    (data / "mine.csv").write_text("image,question,answer\ntest/0.png,?,yes\n")
    (sample,) = read_records(data / "mine.csv", "test", (), format="table")
    write_samples(samples_file(tmp_path, "vqa"), [replace(sample, prediction="yes")])
    (tmp_path / "config.json").write_text(json.dumps({"folder": str(data / "mine.csv")}))
    evaluate(EvalOptions(tmp_path))
    assert "data:image/jpeg" in (tmp_path / "index.html").read_text()


def test_volumes_say_which_slices_they_were_answered_from(tmp_path):
    mask = encode_masks([np.ones((2, 4, 4), bool)])
    volume = Sample("seg3d", "v", "?", category="a", image="v", truth_masks=mask, masks=mask)
    write_samples(samples_file(tmp_path, "seg3d"), [volume])
    (tmp_path / "config.json").write_text(json.dumps({"conditioning": "target"}))
    evaluate(EvalOptions(tmp_path, protocol="both"))
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["notes"].count(CONDITIONING["target"]) for result in results] == [1, 1]


@pytest.mark.parametrize("folder", ["", "CT/"])
def test_slices_in_folders_or_spelled_otherwise_have_their_truth(tmp_path, folder):
    """The table spells é as one character, the disk as two."""
    names = [f"{folder}é{number}.png" for number in range(3)]
    for name in names:
        save_picture(tmp_path / "v1" / unicodedata.normalize("NFD", name))
    mask = "mask/v1/é1_tumor.png"
    save_square(tmp_path / unicodedata.normalize("NFD", mask))
    expression = {"exp": "Tumor in chest CT.", "mask_file": [mask], "img_file": []}
    volume = {"slices": names, "expressions": {"0": expression}}
    write_table(tmp_path / "meta_test.json", {"volumes": {"v1": volume}})
    (sample,) = read_own_format(tmp_path, "test", ["seg3d"])
    (truth,) = decode_masks(sample.truth_masks, "")
    assert sample.image == "v1" and [piece.any() for piece in truth] == [False, True, False]


def test_what_cannot_be_asked_is_one_sentence(data, tmp_path):
    for wrong, complaint in (
        (EvalOptions(tmp_path, mode="infer"), "name it with --checkpoint"),
        (EvalOptions(tmp_path, checkpoint=MICRO), "name its folder with --data"),
        (options(data, tmp_path, mode="score"), "leave out --checkpoint"),
        (options(data, tmp_path, predictions=data), "answers of another system"),
        (replace(options(data, tmp_path), batch_size=0), "--batch-size 0"),
        (options(data, tmp_path, mesh="data=2"), "add --strategy"),
        (options(data, tmp_path, task=("gvqa",)), "no record of gvqa in the split 'test'"),
        (options(data, tmp_path, datasets=("lung",)), "no dataset lung with a split 'test'"),
    ):
        with pytest.raises(InputError, match=complaint):
            evaluate(wrong)


@pytest.mark.slow
def test_questions_of_a_table_are_answered(data, asked, tmp_path):
    """Images lie where the table lies, and so do those of all other formats."""
    table = data / "mine.csv"
    table.write_text(
        "image,question,answer,patient,modality\n"
        'test/0.png,"What, if anything, is there?",a b,p0,CT\n'
        "test/1.png,Is it a liver?,yes,p1,MR\n"
        "test/3.png,Is it there?,no,p3,MR\n"
    )
    out = tmp_path / "run"
    assert evaluate(options(table, out, format="table", mode="infer")) == 1
    questions = {call for calls in asked for call in calls}
    assert questions == {"<image>\nWhat, if anything, is there?", "<image>\nIs it a liver?"}
    first, second, missing = read_samples(samples_file(out, "vqa"), "vqa")
    assert (first.prediction, second.prediction, missing.prediction) == ("a b", "a b", None)
    assert missing.reason == "the image test/3.png is missing; copy it there"
    assert first.groups == {"modality": "CT", "answer_type": "open"} and first.patient == "p0"


@pytest.mark.slow
def test_every_image_is_encoded_once_for_all_tasks(data, model, asked, monkeypatch):
    shutil.copy(data / "test" / "0.png", data / "test" / "3.png")
    save_square(data / "test_mask" / "4_liver.png")
    encoded = []
    encode = model.stages.encode_image
    monkeypatch.setattr(model.stages, "encode_image", lambda *args: encoded.append(1) or encode(*args))
    samples = [s for s in read_own_format(data, "test", ()) if s.task == "seg2d"]
    twice = [*samples, *(replace(s, doc_id=f"again {s.doc_id}", task="disease") for s in samples)]
    asker = Asker(model, data, batch_size=2, max_new_tokens=24)
    answered = list(asker.ask(twice))
    assert sorted(sample.doc_id for sample in answered) == sorted(sample.doc_id for sample in twice)
    assert all(len(sample.masks) == 1 for sample in answered)
    assert len(encoded) == len(samples)
