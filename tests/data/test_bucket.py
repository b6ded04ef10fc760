"""Data in a bucket: a real S3 server on the loopback."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bucket_server import serve
from small_datasets import SIZES, SMALL

from unibiomed_jax import bucket
from unibiomed_jax.data.mixture import find_datasets
from unibiomed_jax.data.packed import is_packed
from unibiomed_jax.data.pipeline import Pipeline, PipelineConfig
from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.datasets import pack as packing
from unibiomed_jax.datasets.pack import PackOptions, pack
from unibiomed_jax.errors import BucketError, InputError
from unibiomed_jax.files import locate, read_range, write_beside

pytest.importorskip("s3fs")
pytest.importorskip("moto")

BUCKETS = BucketConfig(tiles=(1, 3, 5), text=(64, 160, 300), objects=(1, 2))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), "data") as running:
        yield running


@pytest.fixture(autouse=True)
def here(server, monkeypatch):
    server.reach(monkeypatch)


def upload(folder: Path, name: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            (locate(f"s3://data/{name}") / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())
    return f"s3://data/{name}"


def open_pipeline(datasets, tokenizer, **choices) -> Pipeline:
    hosts = {name: choices.pop(name) for name in ("host", "hosts") if name in choices}
    settings = {"sample": replace(SMALL, max_tokens=2000), "batch_size": 4, "buckets": BUCKETS} | choices
    return Pipeline(PipelineConfig(tuple(datasets), **settings), SIZES, tokenizer, **hosts)


def contents(batch) -> tuple:
    arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in batch.arrays.items()}
    return batch.names, arrays


@pytest.mark.scale
def test_a_plain_and_a_packed_dataset_give_the_batches_of_a_disk(server, mixture, byte_tokenizer, tmp_path):
    """Of what is packed each host asks for the ranges of its own records, and a worker process does, too."""
    roots = {config.root: Path(config.root) for config in mixture}
    plain = {str(root): upload(path, f"plain/{path.name}") for root, path in roots.items()}
    packed = {root: f"s3://data/packed/{path.name}" for root, path in roots.items()}
    for number, root in enumerate(roots):  # from a disk, and from a bucket
        source = locate((root, plain[root])[number % 2])
        pack(PackOptions(source, locate(packed[root]), shard_bytes=20_000))
    disk = open_pipeline(mixture, byte_tokenizer)
    steps = range(disk.steps_per_epoch)
    wanted = [contents(disk.read(step)) for step in steps]

    there = open_pipeline([replace(config, root=plain[config.root]) for config in mixture], byte_tokenizer)
    assert there.fingerprint == disk.fingerprint
    assert [contents(there.read(step)) for step in steps] == wanted

    datasets = [replace(config, root=packed[config.root]) for config in mixture]
    there = open_pipeline(datasets, byte_tokenizer)
    assert there.fingerprint == disk.fingerprint
    before = len(server.requests())
    assert [contents(there.read(step)) for step in steps] == wanted
    asked = server.requests()[before:]
    assert asked and all(request["range"] and request["status"].startswith("206") for request in asked)
    assert {request["path"].rpartition(".")[2] for request in asked} == {"rows", "arrayrecord"}

    half = open_pipeline(datasets, byte_tokenizer, host=1, hosts=2)
    before = len(server.requests())
    rows = [half.read(step) for step in steps]
    assert [batch.names for batch in rows] == [names[2:] for names, _ in wanted]
    sent = sum(request["sent"] for request in server.requests()[before:])
    assert sent < 0.75 * sum(request["sent"] for request in asked)

    workers = iter(open_pipeline(datasets, byte_tokenizer, workers=1))
    assert contents(next(workers)) == wanted[0]
    workers.close()


def test_a_dataset_is_packed_into_a_bucket_as_on_a_disk(targets, tmp_path, monkeypatch):
    """Also where it was interrupted: what is there stays; the index comes last."""
    out, settings = locate("s3://data/once"), {"shard_bytes": 5_000, "threads": 1}
    local = pack(PackOptions(targets, tmp_path / "local", **settings))
    assert local.shards > 2
    write, written = packing.write_shard, []

    def interrupt(path, contents):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, contents)

    source = locate(upload(targets, f"loose/{targets.name}"))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(PackOptions(source, out, **settings))
    assert not is_packed(out)
    with pytest.raises(InputError, match="holds the beginning of a pack of s3://data/loose/.*; delete"):
        pack(PackOptions(targets, out, **settings))
    report = pack(PackOptions(source, out, **settings))
    assert report == replace(local, kept=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    with pytest.raises(InputError, match="s3://data/once exists; choose another folder"):
        pack(PackOptions(source, out, **settings))


def test_the_datasets_of_a_bucket_are_found(targets, volumes, tmp_path):
    upload(targets, "found/targets")
    upload(volumes, "found/more/volumes")
    found = find_datasets("s3://data/found")
    assert [(config.name, config.root) for config in found] == [
        ("found/more/volumes/sequence", "s3://data/found/more/volumes"),
        ("found/targets/segmentation", "s3://data/found/targets"),
    ]
    with pytest.raises(InputError, match="s3://data/nothing does not exist"):
        find_datasets("s3://data/nothing")


def test_a_file_and_a_folder_in_a_bucket():
    folder = locate("s3://data/folder")
    assert not folder.exists() and list(folder.iterdir()) == [] and folder.walk_files() == {}
    write_beside(folder / "a.txt", b"0123456789")
    write_beside(folder / "b" / "c.txt", lambda file: file.write(b"c"))
    assert folder.is_dir() and not folder.is_file() and (folder / "a.txt").is_file()
    assert [path.name for path in folder.iterdir()] == ["a.txt", "b"]
    assert {name: entry["size"] for name, entry in folder.walk_files().items()} == {"a.txt": 10, "b/c.txt": 1}
    assert [read_range(folder / "a.txt", *where) for where in ((2, 3), (8, 30), (3, 0))] == [
        b"234",
        b"89",
        b"",
    ]
    with pytest.raises(InputError, match="s3://data/folder/x is missing; copy it again"):
        read_range("s3://data/folder/x", 0, 5)
    with pytest.raises(FileNotFoundError, match="s3://data/folder/x"):
        (folder / "x").read_bytes()
    (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    folder.rmtree()
    folder.rmtree()
    assert not folder.exists()


@pytest.mark.scale
def test_a_bucket_that_cannot_be_used_is_not_a_file_that_is_damaged(server, targets, byte_tokenizer):
    """Of samples that cannot be read others take the place; not so here."""
    there = open_pipeline([DatasetConfig(Kind.SEGMENTATION, upload(targets, "gone"))], byte_tokenizer)
    refused = "s3://data/gone/.* cannot be used: permission is denied; let the credentials in the"
    with server.behaving("refuse all"):
        with pytest.raises(BucketError, match=refused):
            there.read(0)
        with pytest.raises(BucketError, match=refused):
            next(iter(there))
        with pytest.raises(BucketError, match=refused):
            read_range("s3://data/gone/train.json", 0, 10)


def test_without_the_packages_a_sentence_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    bucket._file_system.cache_clear()
    with pytest.raises(
        InputError, match=r"gs:// needs the package gcsfs: pip install 'unibiomed-jax\[bucket\]'"
    ):
        locate("gs://data/folder")
    with pytest.raises(InputError, match="s3:// names no bucket; give one such as s3://BUCKET/FOLDER"):
        locate("s3://")
