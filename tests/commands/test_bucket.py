"""The commands with paths in a bucket: a real S3 server on the loopback."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from bucket_server import serve
from micro_checkpoint import MICRO, assert_same_tensors, read_all, write_released
from places import GOLDEN
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax import checkpoint, cli
from unibiomed_jax.evaluation.records import Sample, encode_masks, samples_file, write_samples
from unibiomed_jax.files import copy_folder, locate

pytestmark = pytest.mark.scale
pytest.importorskip("s3fs")
pytest.importorskip("moto")

IMAGE = GOLDEN / "images" / "CT_abdomen.png"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), "here") as running:
        yield running


@pytest.fixture(autouse=True)
def here(server, monkeypatch):
    server.reach(monkeypatch)


@pytest.fixture
def unibiomed(monkeypatch):
    """Runs `unibiomed` in this process: its exit code."""

    def command(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["unibiomed", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    return command


def files(folder):
    return {name: (folder / name).read_bytes() for name in folder.walk_files()}


def test_a_checkpoint_is_converted_there_and_back(unibiomed, tmp_path):
    released, back = locate("s3://here/released"), locate("s3://here/back")
    write_released(tmp_path / "released", read_all(MICRO))
    (tmp_path / "released" / "modeling.py").write_text("# of the release\n")
    copy_folder(tmp_path / "released", released)
    assert unibiomed("convert", "from-torch", released, "s3://here/converted") == 0
    assert unibiomed("convert", "from-torch", tmp_path / "released", tmp_path / "converted") == 0
    there, local = (checkpoint.read_manifest(at) for at in ("s3://here/converted", tmp_path / "converted"))
    assert there.hash == local.hash
    assert (locate("s3://here/converted") / "release" / "modeling.py").is_file()
    assert unibiomed("convert", "to-torch", "s3://here/converted", back) == 0
    (tmp_path / "back").mkdir()
    for name, content in files(back).items():
        (tmp_path / "back" / name).write_bytes(content)
    assert_same_tensors(read_all(tmp_path / "back"), read_all(MICRO))
    assert unibiomed("convert", "verify", back, "s3://here/converted", "--weights-only") == 0
    assert unibiomed("convert", "to-torch", "s3://here/converted", back) == 2  # it is there


def test_images_of_a_bucket_are_answered_into_a_bucket(unibiomed, tmp_path, capsys):
    images, answers = locate("s3://here/images"), locate("s3://here/images/answers")
    for name in ("a.png", "deep/b.png", ".hidden/c.png", "._d.png"):
        (images / name).write_bytes(IMAGE.read_bytes())
    (images / "notes.txt").write_text("left alone")
    (answers / "a.png" / "mask_0_of_a_run_that_was_killed.png").write_bytes(b"")

    def ask(source, out):
        return unibiomed("predict", source, "--out", out, "--checkpoint", MICRO, "--max-new-tokens=2",
                         "--prompt=<image>Please segment the liver.")  # fmt: skip

    assert ask(images, answers) == 0
    said = capsys.readouterr().out
    assert "2 answered, 0 failed" in said and "notes.txt" in said
    names = files(answers)
    assert {"a.png/answer.json", "a.png/overlay.png", "deep/b.png/answer.json"} <= names.keys()
    assert not any("killed" in name for name in names)
    assert ask(images, answers) == 0
    assert "2 of 2 already answered" in capsys.readouterr().out
    shutil.copy(IMAGE, tmp_path / "a.png")
    assert ask(tmp_path / "a.png", tmp_path / "local") == 0
    local, there = (json.loads(text) for text in ((tmp_path / "local/a.png/answer.json").read_text(),
                                                  names["a.png/answer.json"]))  # fmt: skip
    for name in ("text", "segments", "request", "checkpoint"):
        assert there[name] == local[name]
    assert names["a.png/overlay.png"] == (tmp_path / "local/a.png/overlay.png").read_bytes()


def test_a_dataset_of_a_bucket_is_packed_into_a_bucket(unibiomed, tmp_path):
    for number in range(3):
        save_picture(tmp_path / "liver" / "train" / f"{number}.png", seed=number)
        save_square(tmp_path / "liver" / "train_mask" / f"{number}_liver.png", corner=(number, number))
    write_table(tmp_path / "liver" / "train.json", coco_table(3))
    copy_folder(tmp_path / "liver", locate("s3://here/liver"))
    for path in MICRO.iterdir():
        if path.suffix in (".json", ".txt"):
            (locate("s3://here/tokenizer") / path.name).write_bytes(path.read_bytes())
    command = ("data", "pack", "s3://here/liver", "s3://here/packed/liver", "--tokenizer=s3://here/tokenizer")
    assert unibiomed(*command) == 0
    names = [path.name for path in locate("s3://here/packed/liver").iterdir()]
    assert "packed.json" in names and any(".lengths-" in name for name in names)
    assert not any(name.startswith(".") for name in names)
    assert unibiomed(*command) == 2  # it is there


def test_answers_in_a_bucket_are_scored_there(unibiomed, tmp_path):
    mask = np.zeros((8, 8), bool)
    mask[2:5, 2:5] = True
    runs = locate("s3://here/run"), locate("s3://here/other")
    sample = Sample("seg2d", "1", "Where is the liver?", category="liver", truth_masks=encode_masks([mask]),
                    masks=encode_masks([mask]))  # fmt: skip
    for run in (*runs, tmp_path):
        write_samples(samples_file(run, "seg2d"), [sample, replace(sample, doc_id="2")])
    for run in (*runs, tmp_path):
        assert unibiomed("eval", "--out", run) == 0
    assert (runs[0] / "results.csv").read_text() == (tmp_path / "results.csv").read_text()
    assert unibiomed("eval", "compare", *runs, "--csv=s3://here/compared.csv") == 0
    assert locate("s3://here/compared.csv").is_file()


def test_records_of_a_bucket_are_asked_as_those_of_a_disk(unibiomed, tmp_path, capsys):
    for number in range(2):
        save_picture(tmp_path / "asked" / "liver" / "test" / f"{number}.png", seed=number)
        save_square(tmp_path / "asked" / "liver" / "test_mask" / f"{number}_liver.png", corner=(number, 9))
    write_table(tmp_path / "asked" / "liver" / "test.json", coco_table(2))
    copy_folder(tmp_path / "asked", locate("s3://here/asked"))
    command = ("eval", "--checkpoint", MICRO, "--max-new-tokens=2", "--batch-size=2")
    runs = tmp_path / "local", tmp_path / "there"
    for data, out in zip((tmp_path / "asked", "s3://here/asked"), runs, strict=True):
        assert unibiomed(*command, "--data", data, "--out", out) == 0
    assert unibiomed(*command, "--data", data, "--out", "s3://here/answered") == 2
    assert "choose a folder on a disk" in " ".join(capsys.readouterr().err.split())
    local, there = (samples_file(run, "seg2d").read_text() for run in runs)
    assert there == local and there.count("\n") == 2


def test_predictions_in_a_bucket_are_scored_as_those_on_a_disk(unibiomed, tmp_path):
    """Masks that a table names, and slices that their names alone put into volumes."""
    for number in range(2):
        for folder, corner in (("2d/data/test_mask", 1), ("2d/found/test", 3)):
            save_square(tmp_path / folder / f"{number}_liver.png", corner=(number, corner))
        for folder, corner in (("3d/data", 1), ("3d/found", 3)):
            save_square(tmp_path / folder / f"case-1-{number}_liver.png", corner=(number, corner))
    write_table(tmp_path / "2d" / "data" / "test.json", coco_table(2))
    for name, task, protocol in (("2d", "seg2d", "both"), ("3d", "seg3d", "paper")):
        copy_folder(tmp_path / name, locate(f"s3://here/{name}"))
        for place in (tmp_path, locate("s3://here")):
            given = ("--data", place / name / "data", "--predictions", place / name / "found")
            assert unibiomed("eval", *given, f"--task={task}", f"--protocol={protocol}", "--out",
                             place / f"scored_{name}") == 0  # fmt: skip
        local, there = ((place / f"scored_{name}" / "results.csv").read_text() for place in
                        (tmp_path, locate("s3://here")))  # fmt: skip
        assert there == local and "dice" in there
