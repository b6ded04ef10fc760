"""How the processes of a job find each other, or say who is missing."""

import contextlib
import socket
import threading

import pytest
from job import free_port

from unibiomed_jax import InputError, distributed
from unibiomed_jax.distributed import Processes, _given, _Job, _meet


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(distributed, "ARRIVAL", 1)
    return free_port()


def meet(port: int, *started: tuple[int, int]) -> list[str]:
    """What became of processes (number, of how many), empty for one that may begin."""
    outcomes = [""] * len(started)

    def arrive(place: int, process: int, processes: int) -> None:
        try:
            _meet(_Job("127.0.0.1", port, processes, process))
        except InputError as error:
            outcomes[place] = str(error)

    threads = [threading.Thread(target=arrive, args=(i, *job)) for i, job in enumerate(started)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return outcomes


def test_all_begin_when_the_last_one_is_there(port):
    assert meet(port, (3, 4), (1, 4), (0, 4), (2, 4)) == [""] * 4
    with socket.create_server(("127.0.0.1", port)):  # which is free for JAX
        pass


def test_those_that_are_missing_are_named_everywhere(port):
    said = meet(port, (0, 4), (2, 4))
    assert (
        said == ["Of 4 processes 1, 3 did not come within 1 s; start the same command on every machine."] * 2
    )


def test_a_first_process_that_is_missing_is_named(port):
    (said,) = meet(port, (1, 2))
    assert said == (
        f"Process 0 did not answer at 127.0.0.1:{port} within 1 s; start it, or correct --coordinator."
    )


def test_two_processes_of_one_number_are_named_everywhere(port):
    said = meet(port, (0, 3), (1, 3), (1, 3))
    assert said == ["Two processes are number 1; give every one its own --process."] * 3


def test_another_number_of_processes_is_named_everywhere(port):
    first, second = meet(port, (0, 2), (1, 3))
    assert first == second
    assert first.startswith("Process 1 was started as one of 3 but process 0 as one of 2; give every one")


def test_a_port_that_is_taken_is_named(port):
    with socket.create_server(("", port)):
        (said,) = meet(port, (0, 2))
    assert said.startswith(
        f"Port {port} of this machine cannot be used (Address already in use); give another"
    )


def test_what_else_knocks_at_the_port_disturbs_nobody(port, monkeypatch):
    monkeypatch.setattr(distributed, "ARRIVAL", 5)
    done = threading.Event()

    def knock() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                done.wait(0.05)

    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        assert meet(port, (0, 2), (1, 2)) == ["", ""]
    finally:
        done.set()
        knocking.join()


def test_something_else_at_the_port_is_not_the_first_process(port):
    """JAX's own service, say, which begins its answers with numbers."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].sendall(bytes(range(256)) + b"\n")

        threading.Thread(target=answer, daemon=True).start()
        (said,) = meet(port, (1, 2))
    assert said.startswith("Process 0 did not answer at")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"coordinator": "10.0.0.1:8476"}, "--coordinator, --processes and --process belong together"),
        ({"processes": 2, "process": 0}, "belong together; give all three"),
        ({"coordinator": "10.0.0.1", "processes": 2, "process": 0}, "--coordinator=10.0.0.1 is no HOST:PORT"),
        ({"coordinator": "h:99999", "processes": 2, "process": 0}, "--coordinator=h:99999 is no HOST:PORT"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "--process=2 is none of --processes=2; count"),
        ({"coordinator": "h:1", "processes": 0, "process": 0}, "--process=0 is none of --processes=0"),
    ],
)
def test_options_that_describe_no_process_are_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        _given(Processes(**options))


def test_a_job_of_one_process_meets_nobody():
    assert _given(Processes()) is None
    assert _given(Processes(coordinator="h:1", processes=1, process=0)) is None


def test_slurm_says_which_process_this_is(monkeypatch):
    step = {"JOB_ID": "4711", "STEP_NODELIST": "gpu[03-05]", "NTASKS": "12", "PROCID": "7", "LOCALID": "3"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    job = distributed._surrounding()
    assert job.host == "gpu03" and (job.processes, job.process, job.devices) == (12, 7, [3])


def test_a_process_that_is_alone_agrees_with_itself():
    assert distributed.gather({"a": 1}) == [{"a": 1}] and distributed.first_says(lambda: 2) == 2
    assert distributed.share([1, 2, 3]) == [1, 2, 3] and distributed.is_first()
    distributed.require_equal("anything", {"a": 1})
