"""train.py with its run folder in a bucket: a real S3 server on the loopback, and one as Google's."""

import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import gcs_server
import numpy as np
import pytest
from bucket_server import KEY_ID, SECRET, serve
from orbax.checkpoint.experimental import v1 as ocp
from places import MICRO_RUN, ROOT
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax import UniBiomed, checkpoint
from unibiomed_jax.files import copy_folder, locate
from unibiomed_jax.training.config import CheckpointConfig
from unibiomed_jax.training.snapshot import Checkpointer, find_damage, leaves_by_name

pytestmark = pytest.mark.scale
pytest.importorskip("s3fs")
pytest.importorskip("moto")

STEPS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), "runs") as running:
        yield running


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    """A small dataset, the server, and programs that are compiled once for all runs."""
    base = tmp_path_factory.mktemp("train")
    for split, count in (("train", 12), ("val", 2)):
        for number in range(count):
            save_picture(base / "data" / split / f"{number}.png", seed=number)
            save_square(base / "data" / f"{split}_mask" / f"{number}_liver.png", corner=(number, number))
        write_table(base / "data" / f"{split}.json", coco_table(count))
    return os.environ | server.environment | {
        "MICRO_DATA": str(base / "data"),
        "PYTHONPATH": os.pathsep.join([str(MICRO_RUN.parent), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(base / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def here(server, monkeypatch):
    """This process reaches the server, too."""
    server.reach(monkeypatch)


def command(folder, *options):
    return [sys.executable, str(ROOT / "train.py"), str(MICRO_RUN), f"--folder={folder}",
            f"--optim.steps={STEPS}", *options]  # fmt: skip


def run(environment, folder, *options):
    """Run to the end: (exit code, everything said)."""
    result = subprocess.run(
        command(folder, *options), env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def newest(folder):
    return (
        folder / "checkpoints" / f"{Checkpointer(folder / 'checkpoints', CheckpointConfig()).steps()[-1]:08d}"
    )


def contents(folder):
    """Every leaf of a run's newest checkpoint, and where the data stood."""
    leaves = leaves_by_name(ocp.load(os.fspath(newest(folder) / "state")))
    leaves = {name: (np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for name, leaf in leaves.items()}
    return leaves, (newest(folder) / "position.json").read_text()


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """Folder on a disk of the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    code, said = run(environment, folder, "--log.validate-every=1000000")
    assert code == 0, said
    return folder


def stopped(environment, folder, *options):
    """Start a run, and stop it by SIGTERM when it has saved a checkpoint: everything said."""
    process = subprocess.Popen(
        command(folder, *options),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for_checkpoint(folder, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def wait_for_checkpoint(folder, process):
    while not (folder / "checkpoints" / "00000002" / "manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.05)


def test_a_run_is_stopped_goes_on_and_ends_as_on_a_disk(environment, server, finished):
    folder = locate("s3://runs/one")
    said = stopped(environment, folder, "--log.validate-every=1000000")
    before = int(newest(folder).name)
    assert 2 <= before < STEPS
    (folder / "checkpoints" / "00000099" / "state").write_bytes(b"of a run that was killed while it saved")
    code, more = run(environment, folder, "--log.validate-every=1000000")
    assert code == 0 and f"Going on after update {before} of {STEPS}" in more, more
    assert contents(folder) == contents(finished)
    assert [path.name for path in folder.iterdir()] == [
        "adapter",
        "checkpoints",
        "lock",
        "log.jsonl",
        "model",
        "pictures",
    ]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00000012", "00000014", "00000016"]
    kept, local = ((place / "log.jsonl").read_text().splitlines() for place in (folder, finished))
    assert [json.loads(line)["step"] for line in kept] == [json.loads(line)["step"] for line in local]
    names = [path.name for path in (finished / "pictures").iterdir()]
    for name in names:
        assert (folder / "pictures" / name).read_bytes() == (finished / "pictures" / name).read_bytes()
    assert len(names) == 2

    # The model, asked, exported anew, and as the start of another run.
    assert (
        checkpoint.read_manifest(folder / "model").hash == checkpoint.read_manifest(finished / "model").hash
    )
    answer = UniBiomed.from_pretrained("s3://runs/one/model").predict(
        np.zeros((40, 60, 3), np.uint8), "<image>\nPlease segment the liver.", max_new_tokens=3
    )
    assert answer.text
    (folder / "model").rmtree()
    code, exported = run(environment, folder, "--export=last")
    assert code == 0 and "update 16 is in s3://runs/one/model" in exported, exported
    assert (
        checkpoint.read_manifest(folder / "model").hash == checkpoint.read_manifest(finished / "model").hash
    )
    code, started = run(environment, "s3://runs/two", "--initial=s3://runs/one/model", "--optim.steps=1")
    assert code == 0, started
    everything = said + more + exported + started
    assert SECRET not in everything and KEY_ID not in everything
    for name in locate("s3://runs").walk_files():
        content = (locate("s3://runs") / name).read_bytes()
        assert SECRET.encode() not in content and KEY_ID.encode() not in content, name


def test_a_run_in_a_bucket_of_google_is_stopped_and_ends_as_on_a_disk(
    environment, finished, tmp_path, monkeypatch
):
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    with gcs_server.serve(tmp_path, "bucket-of-runs") as reach:
        for name, value in reach.items() | {("TENSORSTORE_GCS_HTTP_URL", reach["STORAGE_EMULATOR_HOST"])}:
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        folder = locate("gs://bucket-of-runs/one")
        stopped(environment | reach, folder, "--log.validate-every=1000000")
        before = int(newest(folder).name)
        code, said = run(environment | reach, folder, "--log.validate-every=1000000")
        assert code == 0 and f"Going on after update {before} of {STEPS}" in said, said
        assert contents(folder) == contents(finished)
        models = (checkpoint.read_manifest(place / "model") for place in (folder, finished))
        assert len({model.hash for model in models}) == 1


def test_a_damaged_checkpoint_in_a_bucket_is_found(environment, finished):
    """As it was saved, and copied there from a disk."""
    folder = locate("s3://runs/damaged")
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"a": np.arange(1000.0)}, position={}, config={})
    copy_folder(newest(finished), folder / "00000003")
    assert [find_damage(checkpointer.path(step)) for step in (1, 2, 3)] == [None] * 3
    for step in (2, 3):
        held = (checkpointer.path(step) / "state").walk_files()
        largest = "state/" + max(held, key=lambda name: held[name]["size"])
        path = checkpointer.path(step) / largest
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if step == 2 else content[:-1])
        assert find_damage(checkpointer.path(step)) == f"{largest} has changed"
    restored = Checkpointer(folder, CheckpointConfig()).restore({"a": np.zeros(1000)})
    assert restored.step == 1 and (np.asarray(restored.state["a"]) == np.arange(1000.0)).all()


def test_a_bucket_without_permission_or_credentials_or_that_is_not_there(environment, server):
    denied = (
        "cannot be used: permission is denied; let the credentials in the environment read and write there"
    )
    with server.behaving("refuse"):
        code, said = run(environment, "s3://runs/refused")
    assert code == 2 and "Error: s3://runs/refused/" in said and denied in said, said
    without = {name: value for name, value in environment.items() if name not in server.environment}
    without["AWS_ENDPOINT_URL"] = environment["AWS_ENDPOINT_URL"]
    without |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nowhere"}
    code, more = run(without, "s3://runs/unknown")
    assert code == 2 and "there are no credentials for it in the environment; set AWS_ACCESS" in more, more
    code, last = run(environment, "s3://nobody-has-this/run")
    assert code == 2 and "there is no such bucket; correct its name or create it" in last, last
    for words in (said, more, last):
        assert "Traceback" not in words and SECRET not in words and KEY_ID not in words


@pytest.mark.parametrize("moment", ["about.json", "manifest.json"])
def test_a_bucket_that_goes_away_ends_the_run_with_a_sentence(environment, tmp_path, moment):
    """As a checkpoint begins, and when it is complete."""
    with serve(tmp_path, "runs") as server:
        process = subprocess.Popen(
            command("s3://runs/one", "--optim.steps=100000"),
            env=environment | server.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while not any(f"00000002/{moment}" in request["path"] for request in server.requests()):
            assert process.poll() is None
            time.sleep(0.02)
        server.kill()
        start = time.monotonic()
        _, error = process.communicate(timeout=120)
        assert time.monotonic() - start < 60
    assert process.returncode == 2, error
    sentence = " ".join(error.split())
    assert (
        sentence.startswith("Error: s3://runs/one/")
        and "the bucket does not answer; run the same" in sentence
    )
    assert "Traceback" not in error and SECRET not in error and KEY_ID not in error
