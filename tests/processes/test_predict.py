"""`unibiomed predict` in two processes."""

import json
import shutil

import pytest
from job import Job, environment, run
from places import GOLDEN, MICRO, ROOT

pytestmark = pytest.mark.scale

NAMES = ["a.png", "b.png", "c.png", "damaged.png"]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("predict"))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES[:-1]:
        shutil.copyfile(GOLDEN / "images" / "CT_abdomen.png", folder / name)
    (folder / NAMES[-1]).write_bytes(b"no picture")
    return folder


def ask(images, out, *options):
    prompt = "<image>Please segment the liver."
    script = str(ROOT / "unibiomed_jax" / "cli.py")
    return [script, "predict", str(images), "--prompt", prompt, "--checkpoint", str(MICRO), "--out", str(out),
            "--max-new-tokens", "4", *options]  # fmt: skip


def answers(out):
    found = {path.parent.name: json.loads(path.read_text()) for path in out.rglob("answer.json")}
    for answer in found.values():
        del answer["seconds"]
    return found


def test_two_processes_share_the_images_and_the_result_is_that_of_one(env, images, tmp_path):
    together, apart = tmp_path / "together", tmp_path / "apart"
    codes, (first, second) = Job(ask(images, together), env, processes=2).wait()
    assert codes == [1, 1], first + second
    assert "3 answered, 1 failed" in first and "damaged.png: " in first
    assert "answered" not in second and "damaged.png" not in second

    codes, (said,) = Job(ask(images, apart), env, processes=1).wait()
    assert codes == [1], said
    assert sorted(answers(together)) == NAMES[:-1]
    assert answers(together) == answers(apart)

    (images / NAMES[-1]).unlink()
    first, second = run(ask(images, together), env, processes=2)
    assert "3 of 3 already answered" in first and "0 answered, 0 failed" in first


def test_another_folder_of_images_is_named(env, images, tmp_path):
    shutil.copytree(images, tmp_path / "fewer")
    (tmp_path / "fewer" / "a.png").unlink()
    codes, said = Job(
        ask("images", tmp_path / "out"), env, processes=2, folders=(tmp_path, other(tmp_path))
    ).wait()
    assert codes == [2, 2], said
    assert "Process 1 has another folder of images than process 0: number is 3 there and 4 here" in said[0]


def other(base):
    """A machine on which an image is missing."""
    machine = base / "machine"
    machine.mkdir()
    (base / "fewer").rename(machine / "images")
    return machine
