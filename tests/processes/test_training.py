"""train.py in two and in four processes, as in one: the same numbers, whatever ends a process."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
from bucket_server import serve
from job import (
    PATIENCE,
    Job,
    checkpoints,
    contents,
    digests,
    environment,
    log,
    newest,
    run,
    train,
    write_data,
    write_texts,
)
from places import MICRO_RUN, ROOT, TESTS

from unibiomed_jax import checkpoint
from unibiomed_jax.files import locate
from unibiomed_jax.training.snapshot import find_damage

pytestmark = pytest.mark.scale

STEPS, KILLS = 44, 10
FSDP = ("--strategy=fsdp", "--data.batch-size=4")
FOUR = (*FSDP, "--optim.steps=4", "--log.validate-every=4")
LONG = (*FSDP, f"--optim.steps={STEPS}", "--checkpoint.keep-last=100")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def texts(env, tmp_path_factory):
    """The environment of longer runs, in which a process that does not come is missed soon."""
    return env | {"MICRO_DATA": str(write_texts(tmp_path_factory.mktemp("texts"))), "ARRIVAL": "20"}


@pytest.fixture(scope="module")
def one(env, tmp_path_factory):
    """Folder of four updates by one process with four devices."""
    folder = tmp_path_factory.mktemp("one")
    run(train(folder, *FOUR), env, processes=1, devices=4)
    return folder


@pytest.fixture(scope="module")
def four(env, tmp_path_factory):
    """(folder, what each said) of the same by four processes with a device each."""
    folder = tmp_path_factory.mktemp("four")
    return folder, run(train(folder, *FOUR), env, processes=4)


@pytest.fixture(scope="module")
def long(texts, tmp_path_factory):
    """Folder of a longer run by two processes, which nothing interrupted."""
    folder = tmp_path_factory.mktemp("long")
    run(train(folder, *LONG), texts, processes=2)
    return folder


def test_four_processes_compute_what_one_does(one, four):
    folder, _ = four
    assert find_damage(newest(folder)) is None
    expected, found = contents(newest(one)), contents(newest(folder))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    speeds = ("seconds", "images_per_second", "tokens_per_second", "teraflops")
    lines, expected = log(folder), log(one)
    assert [line["kind"] for line in lines] == ["train"] * 4 + ["validation"]
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"kind", *speeds}:
            assert line[name] == pytest.approx(other[name], rel=1e-5), name
    position, other = (json.loads((newest(run) / "position.json").read_text()) for run in (folder, one))
    assert position == other


def test_four_processes_leave_the_model_that_one_does(one, four):
    folder, _ = four
    found, expected = (checkpoint.load(run / "model") for run in (folder, one))  # which checks every hash
    assert found.config == expected.config
    tables = [dict(checkpoint.flatten(loaded.params)) for loaded in (found, expected)]
    assert tables[0].keys() == tables[1].keys()
    for path, value in tables[1].items():
        np.testing.assert_allclose(tables[0][path], value, rtol=1e-5, atol=1e-7, err_msg=path)
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (folder, one)]
    own = [
        {name for name in names if not name.startswith(("model/params", "checkpoints"))} for names in files
    ]
    # Of the validation's two samples the first process sees one, and draws it.
    assert own[1] - own[0] == {"pictures/00000004-0-1.jpg"} and own[0] < own[1]
    assert {"adapter/adapter_model.safetensors", "pictures/00000004-0-0.jpg"} < own[0]


def test_the_first_process_alone_speaks(four):
    _, (first, *others) = four
    assert "Update 4: loss" in first and "The trained model is in" in first
    assert not any("Update" in said or "model" in said for said in others)


def test_a_checkpoint_of_four_processes_is_restored_by_one_and_by_two(env, four):
    folder, _ = four
    expected = digests(contents(newest(folder)))
    script = [str(TESTS / "support" / "restored.py"), str(MICRO_RUN), f"--folder={folder}"]
    batch = "--data.batch-size=4"
    for processes, devices, strategy in ((1, 1, "data_parallel"), (2, 2, "zero1")):
        options = (f"--strategy={strategy}", batch)
        said, *_ = run([*script, *options], env, processes=processes, devices=devices)
        assert json.loads(said[said.index("{") : said.rindex("}") + 1]) == expected


def test_killed_and_stopped_two_processes_end_as_if_nothing_had_happened(texts, long, tmp_path):
    """One process is killed, ten times, while the job starts, trains or saves; then one gets a SIGTERM."""
    moments = random.Random(0)
    command = train(tmp_path, *LONG)
    for number in range(KILLS + 1):
        last = number == KILLS
        with Job(command, texts, processes=2) as job:
            victim = job.running[moments.randrange(2)]
            if last or number % 3:
                wait_for_save(tmp_path, job)
                time.sleep(moments.uniform(0, 0.3))
            else:
                time.sleep(moments.uniform(0, 6))
            assert victim.poll() is None, "the run was over before it could be killed"
            victim.send_signal(signal.SIGTERM if last else signal.SIGKILL)
            started = time.monotonic()
            codes, said = job.wait()
            if last:
                assert codes == [0, 0] and "Stopped by a signal" in said[0], said
            else:
                assert 0 not in codes, said
                assert time.monotonic() - started < 60
    stopped = int(newest(tmp_path).name)
    assert 0 < stopped < STEPS
    first, _ = run(command, texts, processes=2)
    assert f"Going on after update {stopped} of {STEPS}" in first
    assert newest(tmp_path).name == newest(long).name
    assert digests(contents(newest(tmp_path))) == digests(contents(newest(long)))
    assert [line["step"] for line in log(tmp_path)] == list(range(1, STEPS + 1))
    losses, expected = ([line["loss"] for line in log(folder)] for folder in (tmp_path, long))
    assert losses == expected


def wait_until_saved(folder, update, job):
    """Until a checkpoint is complete."""
    end = time.monotonic() + PATIENCE
    while not (folder / "checkpoints" / f"{update:08d}" / "manifest.json").exists():
        assert time.monotonic() < end and all(process.poll() is None for process in job.running)
        time.sleep(0.1)


def wait_for_save(folder, job):
    """Until a save has begun; what a killed job left unfinished goes when the next one starts."""
    before, end = set(checkpoints(folder)), time.monotonic() + PATIENCE
    while set(checkpoints(folder)) <= before and all(process.poll() is None for process in job.running):
        assert time.monotonic() < end
        time.sleep(0.002)


def test_two_processes_in_a_bucket_end_as_on_a_disk(texts, long, tmp_path, monkeypatch):
    """Meanwhile another job is told who is there; then one process is killed, and nobody helps."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with serve(tmp_path, "runs") as server:
        server.reach(monkeypatch)
        folder, env = locate("s3://runs/two"), texts | server.environment
        command = train(folder, *LONG)
        with Job(command, env, processes=2) as job:
            wait_until_saved(folder, 2, job)
            codes, (said,) = Job(command, env, processes=1, devices=2).wait()
            assert codes == [2] and "Traceback" not in said, said
            first = job.running[0]
            assert f"Another process trains in s3://runs/two (process {first.pid} on " in said
            assert all(process.poll() is None for process in job.running)
            job.running[1].kill()
            codes, said = job.wait()
            assert 0 not in codes, said
        complete = (folder / "checkpoints" / name / "manifest.json" for name in checkpoints(folder))
        saved = max(int(manifest.parent.name) for manifest in complete if manifest.exists())
        with Job(command, env, processes=2) as job:
            wait_until_saved(folder, saved + 2, job)
            job.running[1].send_signal(signal.SIGTERM)
            codes, (first, _) = job.wait()
            assert codes == [0, 0] and f"Going on after update {saved} of {STEPS}" in first, first
        there, expected = (place / "checkpoints" / f"{saved + 2:08d}" for place in (folder, long))
        assert find_damage(there) is None
        assert digests(contents(there)) == digests(contents(expected))
        assert [line["step"] for line in log(folder)] == list(range(1, int(newest(folder).name) + 1))


# ------------------------------------------------------------------------------------------------------------
# Processes that do not belong together


def refused(arguments, env, **settings) -> str:
    """What both processes of a job say when one of them refuses."""
    codes, said = Job(arguments, env, processes=2, **settings).wait()
    assert codes == [2, 2], said
    assert not any("Traceback" in text for text in said), said
    return " ".join(said)


def test_another_configuration_is_named(env, tmp_path):
    """Also where it asks what devices there are, which must not come before the processes have met."""
    asking = tmp_path / "asking.py"
    asking.write_text("import jax\nfrom micro_run import config\nassert jax.device_count() == 2\n")
    command = [str(ROOT / "train.py"), str(asking), f"--folder={tmp_path / 'run'}"]
    said = refused(command, env, own=((), ("--seed=1",)))
    assert "Process 1 has another configuration than process 0: seed is 1 there and 42 here" in said


def test_another_program_is_named(env, tmp_path):
    shutil.copytree(ROOT / "unibiomed_jax", tmp_path / "unibiomed_jax")
    with (tmp_path / "unibiomed_jax" / "files.py").open("a") as file:
        file.write("# changed\n")
    other = {"PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"}
    said = refused(train(tmp_path / "run"), env, own_env=({}, other))
    assert "Process 1 has another program than process 0: unibiomed_jax is " in said


def test_other_data_is_named(env, tmp_path):
    other = {"MICRO_DATA": str(write_data(tmp_path / "data", "Spleen in abdomen CT."))}
    said = refused(train(tmp_path / "run"), env, own_env=({}, other))
    assert "Process 1 has another data set than process 0: training data is " in said


def test_two_jobs_in_one_run_folder_are_refused(texts, long, tmp_path):
    """While the first is in it; it is not disturbed."""
    command = train(tmp_path, *LONG)
    with Job(command, texts, processes=2) as job:
        wait_for_save(tmp_path, job)
        said = refused(command, texts)
        assert f"Another process trains in {tmp_path}" in said
        assert all(process.poll() is None for process in job.running)
