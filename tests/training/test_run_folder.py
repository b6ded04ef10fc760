"""One process trains in a run's folder; any number may read."""

import errno
import subprocess
import sys

import pytest

from unibiomed_jax.errors import InputError
from unibiomed_jax.training.config import CheckpointConfig
from unibiomed_jax.training.snapshot import Checkpointer

HOLD = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.flock(lock, fcntl.LOCK_EX); print(); input()"


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "checkpoints", CheckpointConfig())


def test_the_lock_of_another_process_holds_until_its_death(checkpointer, tmp_path):
    leftover = checkpointer.folder / "00000009.partial"
    leftover.mkdir()
    command = [sys.executable, "-u", "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        said = f"Another process trains in {tmp_path}; .*--folder.$"
        with pytest.raises(InputError, match=said), checkpointer.claim():
            pass
        assert leftover.exists()
        other.kill()
    with checkpointer.claim():
        assert not leftover.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_goes_without(checkpointer, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "flock")

    monkeypatch.setattr("fcntl.flock", refuse)
    with checkpointer.claim():
        pass


def test_a_folder_that_another_machine_does_not_see_is_refused(checkpointer, monkeypatch):
    monkeypatch.setattr("unibiomed_jax.distributed.gather", lambda value: [value, False])
    with pytest.raises(InputError, match="Process 1 does not see what process 0 writes into "):
        with checkpointer.claim():
            pass
