"""Locks in a bucket: a real S3 server on the loopback. (That of a disk: training/test_run_folder.py.)"""

import json
import threading
import time

import pytest
from bucket_server import serve

from unibiomed_jax import locks
from unibiomed_jax.bucket import BucketPath
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import locate

pytestmark = pytest.mark.scale
pytest.importorskip("s3fs")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), "locks") as running:
        yield running


@pytest.fixture(autouse=True)
def here(server, monkeypatch):
    server.reach(monkeypatch)
    monkeypatch.setattr(locks, "BEAT", 0.3)
    monkeypatch.setattr(locks, "SILENCE", 3)


@pytest.fixture
def path(request):
    return locate(f"s3://locks/{request.node.name}/lock")


def hold(path):
    return locks.hold(path, does="trains in there", remedy="choose another --folder")


def leave_behind(path):
    """The lock of a job that was killed."""
    path.write_text(json.dumps({"process": 12, "host": "there", "since": "yesterday", "id": "0"}))


def test_one_job_holds_the_lock_and_the_other_is_told_who(path):
    with hold(path) as lock:
        began = time.monotonic()
        with pytest.raises(InputError, match=r"^Another process trains in there \(process \d+ on .* since "
                           r".* UTC\); choose another --folder.$"), hold(path):  # fmt: skip
            pass
        assert time.monotonic() - began < locks.SILENCE
        time.sleep(locks.SILENCE + 1)  # it lives on for as long as it is held
        with pytest.raises(InputError), hold(path):
            pass
        lock.check()
    with hold(path):  # at once: it was let go
        pass
    assert [other.name for other in path.parent.iterdir()] == ["lock"] and path.read_bytes() == b""


def test_the_lock_of_a_killed_job_is_taken_when_it_has_been_silent(path, caplog):
    leave_behind(path)
    began = time.monotonic()
    with hold(path) as lock:
        assert time.monotonic() - began > locks.SILENCE - 1.5  # a bucket counts whole seconds
        lock.check()
    assert "is held by process 12 on there since yesterday; waiting for a sign of life" in caplog.text
    leave_behind(path)
    time.sleep(locks.SILENCE + 1)
    began = time.monotonic()
    with hold(path):
        assert time.monotonic() - began < locks.SILENCE / 2


def test_of_many_that_come_at_once_one_gets_it(path):
    leave_behind(path)
    time.sleep(locks.SILENCE + 1)
    together, results = threading.Barrier(6), []

    def come():
        together.wait()
        try:
            with hold(path):
                time.sleep(2 * locks.SILENCE / 3)
                results.append("held")
        except InputError:
            results.append("refused")

    comers = [threading.Thread(target=come) for _ in range(6)]
    for comer in comers:
        comer.start()
    for comer in comers:
        comer.join()
    assert sorted(results) == ["held"] + ["refused"] * 5


def test_who_was_thought_dead_is_told_and_leaves_the_lock_to_the_other(path):
    with hold(path) as lock:
        leave_behind(path)
        with pytest.raises(InputError, match="trains in there since this one gave no sign of life for 3 s"):
            for _ in range(50):
                time.sleep(0.1)
                lock.check()
    assert json.loads(path.read_text())["process"] == 12


def test_a_bucket_that_knows_no_conditions_or_does_not_let_write(path, server):
    with server.behaving("know no conditions"), hold(path), pytest.raises(InputError), hold(path):
        pass
    with server.behaving("refuse"), pytest.raises(BucketError, match="permission is denied"), hold(path):
        pass


@pytest.mark.parametrize("unanswered", ["write_if", "version"])
def test_an_answer_that_does_not_come_is_no_loss(path, monkeypatch, unanswered):
    whole, failures = getattr(BucketPath, unanswered), []

    def once(self, *arguments):
        answer = whole(self, *arguments)
        if self == path and armed and not failures:
            failures.append(1)
            raise BucketError("the bucket does not answer")
        return answer

    monkeypatch.setattr(BucketPath, unanswered, once)
    armed = False
    with hold(path) as lock:
        armed = True
        time.sleep(5 * locks.BEAT)
        assert failures
        lock.check()
        with pytest.raises(InputError), hold(path):
            pass


def test_whatever_a_library_raises_the_lock_is_signed_again(path, monkeypatch):
    whole, failures = BucketPath.write_if, []

    def busy(self, *arguments):
        if self == path and armed and len(failures) < 2:
            failures.append(1)
            raise ValueError("429")
        return whole(self, *arguments)

    monkeypatch.setattr(BucketPath, "write_if", busy)
    armed = False
    with hold(path) as lock:
        before = path.version()[0]
        armed = True
        time.sleep(8 * locks.BEAT)
        assert len(failures) == 2 and path.version()[0] != before
        lock.check()


def test_who_slept_looks_before_it_writes(path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 2)
    with hold(path) as lock:
        leave_behind(path)
        lock._signed -= locks.SILENCE
        with pytest.raises(InputError, match="no sign of life"):
            lock.check()
