"""Checkpoints from the Hugging Face hub: a server on the loopback answers as the hub does."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from golden_cases import NEW_TOKENS, assert_masks_equal, load, request
from hub_server import TOKEN, HostedRepository, HubServer, read_files
from huggingface_hub import constants
from micro_checkpoint import micro_tensors, run_command, write_released
from PIL import Image
from places import GOLDEN, MICRO, ROOT

from unibiomed_jax import InputError, UniBiomed, checkpoint, cli, runtime
from unibiomed_jax.config.precision import FLOAT32
from unibiomed_jax.conversion import from_torch, hub, loading, sources
from unibiomed_jax.errors import DiskFullError

pytestmark = pytest.mark.slow

NAME = "lab/unibiomed-micro"
# What is wanted of it.
WANTED = {path.name for path in MICRO.iterdir()} | {"modeling_sa2va_chat.py"}
SECRET = re.compile("hf_|Bearer|Signature")


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """As of a user who never downloaded anything; huggingface_hub read it when it was imported."""
    runtime.prepare()  # which keeps compiled programs in the cache folder of before
    for name in [n for n in os.environ if n.startswith("HF_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def server(environment, monkeypatch):
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    yield server
    server.close()


@pytest.fixture
def repository(server) -> HostedRepository:
    """The golden checkpoint, beside what releases hold besides."""
    server.repositories[NAME] = HostedRepository()
    server.repositories[NAME].push(release())
    return server.repositories[NAME]


def release() -> dict[str, bytes]:
    others = ("README.md", "pytorch_model.bin", "training.pth", "images/ct.png", "adapter/model.safetensors")
    code = {"modeling_sa2va_chat.py": b"raise SystemExit('was executed')\n"}
    return read_files(MICRO) | code | {name: b"not wanted" for name in others}


def changed_release(folder: Path) -> dict[str, bytes]:
    """Other weights under the same names."""
    tensors = micro_tensors()
    tensors["mlp1.0.bias"] = tensors["mlp1.0.bias"] + np.float32(1)
    return read_files(write_released(folder, tensors))


def converted(tmp_path: Path) -> list[Path]:
    """What the cache of conversions holds, names that begin with a dot included."""
    return sorted((tmp_path / "cache" / "unibiomed_jax" / "converted").glob("*/*"))


def refusal(call, *arguments) -> str:
    """The sentence with which something is refused; neither it nor its traceback says a secret."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 400, sentence
    assert not SECRET.search("".join(traceback.format_exception(caught.value)).replace("HF_", ""))
    return sentence


@pytest.fixture(scope="module")
def expected() -> str:
    """The identity of the weights of the golden checkpoint."""
    return from_torch.read_released(MICRO).hash


# ------------------------------------------------------------------------------------------------------------
# What is fetched, and kept


def test_first_start_converts_and_answers_second_only_reads(server, repository, expected, tmp_path):
    start = time.perf_counter()
    model = UniBiomed.from_pretrained(NAME, precision=FLOAT32)
    first = time.perf_counter() - start
    assert model.checkpoint_hash == expected
    assert server.sent() == sorted(WANTED) and not server.token_left_the_hub
    golden = load("image_abdomen")
    image = Image.open(GOLDEN / "images" / "CT_abdomen.png")
    asked = request(model, image, "image_abdomen", golden)
    answer = model.predict_batch([asked], max_new_tokens=NEW_TOKENS)[0]
    assert answer.text == str(golden["prediction"])
    assert_masks_equal(answer, golden)

    (folder,) = [path for path in converted(tmp_path) if not path.name.startswith(".")]
    assert folder.name == repository.revisions["main"] and folder.parent.name == "lab--unibiomed-micro"
    from_torch.convert(sources.released(MICRO), tmp_path / "by hand")
    by_hand = checkpoint.read_manifest(tmp_path / "by hand")
    assert checkpoint.read_manifest(folder) == by_hand and by_hand.hash == expected
    assert (folder / "release" / "modeling_sa2va_chat.py").read_bytes().startswith(b"raise SystemExit")

    # What was downloaded may go.
    shutil.rmtree(tmp_path / "downloads")
    server.requests.clear()
    start = time.perf_counter()
    again = UniBiomed.from_pretrained(NAME, precision=FLOAT32)
    second = time.perf_counter() - start
    print(f"first start {first:.2f} s, second {second:.2f} s")
    assert again.checkpoint_hash == expected
    assert server.requests == [("GET", f"/api/models/{NAME}")]


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, repository, expected, tmp_path):
    old = repository.revisions["main"]
    assert loading.load(NAME).hash == expected
    new = repository.push(changed_release(tmp_path / "changed"))
    repository.revisions |= {"v1.0": old, "refs/pr/2": new}
    changed = loading.load(NAME).hash
    assert changed != expected  # the branch moved on, and so does who follows it
    assert loading.load(f"{NAME}@refs/pr/2").hash == changed
    assert loading.load(f"{NAME}@v1.0").hash == expected
    assert sorted(p.name for p in converted(tmp_path) if p.is_dir()) == sorted([old, new])
    server.requests.clear()
    assert loading.load(f"{NAME}@{old}").hash == expected
    assert not server.requests  # a commit is what it is


def test_a_commit_can_be_the_first_thing_that_is_asked_for(server, repository, expected):
    assert loading.load(f"{NAME}@{repository.revisions['main']}").hash == expected


def test_a_repository_may_hold_a_converted_checkpoint(server, expected, tmp_path, monkeypatch, capsys):
    from_torch.convert(sources.released(MICRO), tmp_path / "made")
    repository = server.repositories[NAME] = HostedRepository()
    files = read_files(tmp_path / "made")
    repository.push(files | {"README.md": b"", "pytorch_model.bin": b""})
    loaded = loading.load(NAME)
    assert loaded.hash == expected and str(loaded.tokenizer).startswith(constants.HF_HUB_CACHE)
    assert read_files(loaded.tokenizer.parent) == files and not converted(tmp_path)
    server.requests.clear()
    assert loading.load(NAME).hash == expected and not server.sent()
    assert run_command(monkeypatch, from_torch, NAME, tmp_path / "out") == 2
    assert f"{NAME} is a converted checkpoint already" in " ".join(capsys.readouterr().err.split())


def test_shards_are_fetched_with_their_index(server, expected, tmp_path):
    from unibiomed_jax.conversion import to_torch

    from_torch.convert(sources.released(MICRO), tmp_path / "made")
    to_torch.convert(tmp_path / "made", tmp_path / "shards", shard_bytes=1_000_000)
    files = read_files(tmp_path / "shards")
    assert sum(name.endswith(".safetensors") for name in files) > 2
    server.repositories[NAME] = HostedRepository()
    server.repositories[NAME].push(files)
    assert loading.load(NAME).hash == expected


@pytest.mark.parametrize("damage", ["parameter", "manifest", "empty"])
def test_a_damaged_conversion_is_made_anew(server, repository, expected, tmp_path, caplog, damage):
    folder = loading.fetch(NAME)
    if damage == "parameter":
        file = max((folder / "params" / "mlp1").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        file.write_bytes(bytes(file.stat().st_size))
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    server.requests.clear()
    assert loading.load(NAME).hash == expected
    assert "made anew" in caplog.text
    assert not server.sent()  # the download is still there
    caplog.clear()
    assert loading.load(NAME).hash == expected
    assert not caplog.text
    assert not [p for p in converted(tmp_path) if "partial" in p.name]


def test_what_a_killed_conversion_left_is_cleared_away(server, repository, tmp_path):
    left = tmp_path / "cache/unibiomed_jax/converted/lab--unibiomed-micro"
    left /= f".{repository.revisions['main']}.partial-0123abcd"
    left.mkdir(parents=True)
    (left / "params").write_bytes(b"half")
    loading.fetch(NAME)
    assert not left.exists()


def test_what_another_process_has_mended_is_not_made_again(server, repository, expected, monkeypatch):
    loading.fetch(NAME)
    read, convert, made = checkpoint.load, from_torch.convert, []
    monkeypatch.setattr(from_torch, "convert", lambda *args, **kw: (made.append(args), convert(*args, **kw)))

    def read_while_another_mends(folder, **named):
        (folder / "manifest.json").unlink()
        monkeypatch.setattr(checkpoint, "load", read)
        loading.load(NAME)
        raise InputError("It was damaged.")

    monkeypatch.setattr(checkpoint, "load", read_while_another_mends)
    assert loading.load(NAME).hash == expected
    assert len(made) == 1


# Downloads, waits until the other one has done so, too, and says when it converts.
PROCESS = """
import os, sys, time
from pathlib import Path
from unibiomed_jax.conversion import from_torch, hub, loading
download, convert = hub.download, from_torch.convert

def download_both(*args):
    folder = download(*args)
    Path(sys.argv[2], str(os.getpid())).touch()
    while len(os.listdir(sys.argv[2])) < 2:
        time.sleep(0.01)
    return folder

hub.download = download_both
from_torch.convert = lambda *args, **options: (print("converts"), convert(*args, **options))
print(loading.load(sys.argv[1]).hash)
"""


def test_processes_that_start_at_once_convert_once(server, repository, expected, tmp_path):
    """And they find the server as users name it: by the environment alone."""
    variables = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    repository.private = True
    (tmp_path / "ready").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, NAME, str(tmp_path / "ready")],
            env=os.environ | variables | {"JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sorted(line for out, _ in said for line in out.split()) == sorted([expected, expected, "converts"])
    assert all("Fetching" in err and not SECRET.search(err) for _, err in said)
    assert (tmp_path / "home" / "hub").is_dir() and not server.token_left_the_hub


# ------------------------------------------------------------------------------------------------------------
# What names a repository


@pytest.mark.parametrize(
    "source",
    [
        "/tmp/owner/name",
        "./owner/name",
        "../name",
        "~/name",
        "owner",
        "a/b/c",
        "a--b/c",
        "a/b..c",
        "a/b@",
        "a/b ",
    ],
)
def test_what_has_not_the_form_of_a_name_is_a_path(source):
    assert hub.repository(source) is None
    assert "is not a folder" in refusal(loading.load, source)


def test_what_exists_and_what_is_a_path_is_never_looked_up(tmp_path, monkeypatch, expected):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MICRO, NAME)
    assert loading.load(NAME).hash == expected
    assert "is not a folder" in refusal(loading.load, Path("owner/name"))
    with pytest.raises(InputError, match="iter_1.pth is missing"):
        from_torch.open_source(from_torch.FromTorchOptions("runs/iter_1.pth", Path("out")))


# ------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_a_missing_repository_or_revision_is_one_sentence(server, repository, monkeypatch):
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        sentence = refusal(loading.load, "lab/nothing")
        assert "lab/nothing is no folder here and no repository" in sentence and server.endpoint in sentence
    for revision in ("v9", "f" * 40):
        assert f"no revision '{revision}'" in refusal(loading.load, f"{NAME}@{revision}")


def test_private_and_gated_repositories_need_a_token(server, repository, expected, monkeypatch, tmp_path):
    repository.private = True
    assert "set HF_TOKEN or run `hf auth login`" in refusal(loading.load, NAME)
    repository.private, repository.gated = False, True
    assert f"ask for access at {server.endpoint}/{NAME}" in refusal(loading.load, NAME)
    assert "model.safetensors" not in server.sent()
    monkeypatch.setenv("HF_TOKEN", "hf_anOldToken")
    assert f"{server.endpoint} refuses {NAME} (401); set HF_TOKEN" in refusal(loading.load, NAME)
    for token in ("hf_an\x0cToken", "hf_anT\u00f6ken"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert "holds characters that no token has" in refusal(loading.load, NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert loading.load(NAME).hash == expected
    assert not server.token_left_the_hub


def test_the_token_is_never_said(server, repository, monkeypatch, caplog, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    server.cuts = [1000]
    loading.load(NAME)
    server.status = 500  # whose answer repeats the token
    refusal(loading.load, "lab/other")
    said = capfd.readouterr()
    for text in (caplog.text, said.out, said.err):
        assert TOKEN not in text


def test_no_network_is_one_sentence_unless_all_is_here(server, repository, expected, monkeypatch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", closed)
    sentence = refusal(loading.load, NAME)
    assert f"{closed} cannot be reached" in sentence and "refused" in sentence
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    loading.load(NAME)
    monkeypatch.setenv("HF_ENDPOINT", closed)
    assert loading.load(NAME).hash == expected
    shutil.rmtree(tmp_path / "cache")  # what was downloaded will do
    assert loading.load(NAME).hash == expected
    assert f"{closed} cannot be reached" in refusal(loading.load, f"{NAME}@v1")


def test_a_hub_that_is_down_or_silent_is_one_sentence(server, repository, expected, monkeypatch, tmp_path):
    for server.status in (429, 503):
        assert f"cannot be reached (it answers {server.status})" in refusal(loading.load, NAME)
    server.status, server.delay = None, 1.0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    assert "cannot be reached (timed out)" in refusal(loading.load, NAME)
    server.delay = 0.0
    loading.load(NAME)
    for server.status in (429, 503):
        assert loading.load(NAME).hash == expected
    shutil.rmtree(tmp_path / "cache")
    server.status, server.delay = None, 1.0
    server.requests.clear()
    assert loading.load(NAME).hash == expected
    assert len(server.requests) == 1  # asked once, and waited for no more


def test_what_answers_otherwise_than_a_hub_is_one_sentence(server, repository, monkeypatch, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    server.plain = True
    sentence = refusal(loading.load, NAME)
    assert "(FileMetadataError)" in sentence and "/resolve/" not in sentence
    server.pretended_commit = "../../../../precious"
    assert "which is none; check HF_ENDPOINT" in refusal(loading.load, NAME)
    assert outside.is_dir()
    monkeypatch.setenv("HF_ENDPOINT", f"{server.endpoint}/elsewhere")
    assert "does not know" in refusal(loading.load, NAME)
    monkeypatch.setenv("HF_ENDPOINT", "not an address")
    assert "not an address cannot be reached" in refusal(loading.load, NAME)


def test_offline_the_cache_alone_is_asked(server, repository, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in ("", "@v1", "@" + "f" * 40):
        sentence = refusal(loading.load, NAME + revision)
        assert f"{NAME}{revision} is no folder" in sentence and "HF_HUB_OFFLINE forbids" in sentence
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loading.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    commit = repository.revisions["main"]
    for kept in ("converted", "downloaded"):
        assert loading.load(NAME).hash == expected, kept
        assert loading.load(f"{NAME}@{commit}").hash == expected, kept
        shutil.rmtree(tmp_path / "cache")
    (weights,) = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/model.safetensors")
    weights.unlink()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    for revision in ("", f"@{commit}"):
        assert "not complete" in refusal(loading.load, NAME + revision)
    assert not server.requests


def test_a_file_cut_off_is_gone_on_with(server, repository, expected, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    server.cuts = [1_000_000, 500_000, 0]
    assert loading.load(NAME).hash == expected
    assert server.ranges == ["bytes=1000000-", "bytes=1500000-", "bytes=1500000-"]


def test_a_file_that_never_comes_is_one_sentence(server, repository, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.cuts = [100_000] + [0] * 20
    sentence = refusal(loading.load, NAME)
    assert f"The download of {NAME} from {server.endpoint} broke off" in sentence and "peer" in sentence
    kept = {path.name for path in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*")}
    assert kept and "model.safetensors" not in kept and not converted(tmp_path)
    server.cuts = []
    server.requests.clear()
    assert loading.load(NAME).hash == expected
    assert server.sent() == sorted(WANTED - kept)


def test_a_pickle_is_never_downloaded(server, tmp_path):
    files = {name: data for name, data in release().items() if name != "model.safetensors"}
    server.repositories[NAME] = HostedRepository()
    server.repositories[NAME].push(files)
    assert f"{NAME} holds no safetensors" in refusal(loading.load, NAME)
    assert not [name for name in server.sent() if name.endswith((".bin", ".pth"))]
    server.repositories[NAME].push({"pytorch_model.bin": b""})
    assert f"{NAME} holds no safetensors" in refusal(loading.load, NAME)
    assert not converted(tmp_path)


def test_a_repository_of_something_else_is_one_sentence(server, repository, tmp_path):
    repository.push(release() | {"config.json": b'{"model_type": "llama"}'})
    assert "'model_type' is 'llama'" in refusal(loading.load, NAME)
    assert [p for p in converted(tmp_path) if p.is_dir()] == []


def test_a_full_disk_is_one_sentence(server, repository, expected, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", full)
        assert "is full; free some space" in refusal(loading.load, NAME)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        with pytest.raises(DiskFullError):
            loading.load(NAME)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        assert "only 0.00 GB are free" in refusal(loading.load, NAME)
    assert [p for p in converted(tmp_path) if p.is_dir()] == []
    assert loading.load(NAME).hash == expected


@pytest.mark.parametrize("cache", ["downloads", "cache"])
def test_a_cache_that_cannot_be_written_is_one_sentence(server, repository, tmp_path, cache):
    (tmp_path / cache).write_text("a file")
    sentence = refusal(loading.load, NAME)
    assert str(tmp_path / cache) in sentence
    assert {"downloads": "HF_HOME", "cache": "XDG_CACHE_HOME"}[cache] in sentence


# ------------------------------------------------------------------------------------------------------------
# The commands


def test_the_converter_takes_a_repository(server, repository, expected, monkeypatch, tmp_path, capsys):
    commit = repository.revisions["main"]
    assert run_command(monkeypatch, from_torch, f"{NAME}@{commit}", tmp_path / "out") == 0
    assert "Converted 425 tensors" in capsys.readouterr().out
    assert checkpoint.read_manifest(tmp_path / "out").hash == expected
    assert not converted(tmp_path)  # it is where it was asked for
    assert run_command(monkeypatch, from_torch, "lab/nothing", tmp_path / "other") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("Error: lab/nothing is no folder here")


def test_predict_hands_the_name_on(monkeypatch, tmp_path, capsys):
    def from_pretrained(source, **options):
        raise InputError(f"asked for {source!r}")

    fetched = []
    monkeypatch.setattr(loading, "fetch", fetched.append)
    monkeypatch.setattr(UniBiomed, "from_pretrained", from_pretrained)
    image, name = str(GOLDEN / "images" / "CT_abdomen.png"), f"{NAME}@v1"
    options = ["--prompt", "<image>Liver?", "--checkpoint", name, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["unibiomed", "predict", image, *options])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"Error: asked for {name!r}\n" and fetched == [name]


def test_a_trained_file_over_a_base_of_the_hub(server, repository, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        f"mllm.model.{n}": torch.ones(v.shape) for n, v in micro_tensors().items() if n == "mlp1.0.bias"
    }
    torch.save({"state_dict": tensors}, tmp_path / "iter_1.pth")
    source = from_torch.open_source(
        from_torch.FromTorchOptions(tmp_path / "iter_1.pth", tmp_path / "out", base=NAME)
    )
    assert source.tensors["mlp1.0.bias"].read().min() == 1
    assert set(source.tensors) == set(micro_tensors())
