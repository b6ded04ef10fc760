"""`unibiomed data pack`: the same batches from shards, to the byte; what is interrupted, damaged, refused."""

import fcntl
import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from places import MICRO, SAMPLE_DATA
from small_datasets import SIZES, SMALL, save_picture

from unibiomed_jax.data import packed as packed_room
from unibiomed_jax.data import transforms
from unibiomed_jax.data.mixture import find_datasets, read_mixture
from unibiomed_jax.data.packed import INDEX, VERSION, PackedRecords
from unibiomed_jax.data.pipeline import Pipeline, PipelineConfig
from unibiomed_jax.data.plan import BucketConfig
from unibiomed_jax.data.records import DatasetConfig, Kind
from unibiomed_jax.data.transforms import SampleBuilder, SampleConfig
from unibiomed_jax.datasets import pack as pack_room
from unibiomed_jax.datasets.pack import PackOptions, pack
from unibiomed_jax.datasets.validate import ValidateOptions, validate
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import Tokenizer

BUCKETS = BucketConfig(tiles=(1, 3, 5), text=(64, 160, 300), objects=(1, 2))


def open_pipeline(datasets, tokenizer, **choices) -> Pipeline:
    hosts = {name: choices.pop(name) for name in ("host", "hosts", "training") if name in choices}
    settings = {"sample": replace(SMALL, max_tokens=2000), "batch_size": 4, "buckets": BUCKETS} | choices
    return Pipeline(PipelineConfig(tuple(datasets), **settings), SIZES, tokenizer, **hosts)


def digests(batches) -> list[str]:
    found = []
    for batch in batches:
        hashed = hashlib.sha256("\n".join(batch.names).encode())
        for name, array in sorted(batch.arrays.items()):
            hashed.update(
                f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
            )
        found.append(hashed.hexdigest())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def packed_mixture(mixture, folder: Path, **options) -> tuple[DatasetConfig, ...]:
    """The mixture's datasets, each folder packed into one of the same name."""
    places = {config.root: folder / Path(config.root).name for config in mixture}
    for root, place in places.items():
        pack(PackOptions(Path(root), place, **options))
    return tuple(replace(config, root=str(places[config.root])) for config in mixture)


def test_all_kinds_give_the_same_batches(mixture, byte_tokenizer, tmp_path):
    datasets = packed_mixture(mixture, tmp_path / "packed", shard_bytes=20_000)
    for root in {config.root for config in mixture}:
        shutil.move(root, root + ".away")  # nothing but the shards is read
    with pytest.raises(InputError, match="does not exist"):
        open_pipeline(mixture, byte_tokenizer)
    ours = open_pipeline(datasets, byte_tokenizer)
    halves = [open_pipeline(datasets, byte_tokenizer, host=host, hosts=2) for host in range(2)]
    workers = iter(open_pipeline(datasets, byte_tokenizer, workers=2))
    found = [ours.read(step) for step in range(2 * ours.steps_per_epoch)]
    parts = [digests(half.read(step) for step in range(8)) for half in halves]
    by_workers = [next(workers) for _ in range(8)]
    workers.close()
    for root in {config.root for config in mixture}:
        shutil.move(root + ".away", root)
    theirs = open_pipeline(mixture, byte_tokenizer)
    assert {config.kind for config in datasets} == set(Kind)
    assert ours.fingerprint == theirs.fingerprint
    assert digests(found) == digests(theirs.read(step) for step in range(2 * ours.steps_per_epoch))
    assert digests(by_workers) == digests(found[:8])
    for host, part in enumerate(parts):
        loose = open_pipeline(mixture, byte_tokenizer, host=host, hosts=2)
        assert part == digests(loose.read(step) for step in range(8))


def test_a_mixture_of_packed_and_plain_and_a_run_that_goes_from_one_to_the_other(
    mixture, byte_tokenizer, tmp_path
):
    datasets = packed_mixture(mixture, tmp_path / "packed")
    plain = open_pipeline(mixture, byte_tokenizer)
    mixed = open_pipeline((*datasets[:3], *mixture[3:]), byte_tokenizer)
    first, second = iter(plain), iter(mixed)
    for _ in range(3):
        next(first)
    second.set_state(first.get_state())
    assert digests(next(second) for _ in range(10)) == digests(next(first) for _ in range(10))
    first.close()
    second.close()


@pytest.fixture(scope="module")
def sample_pack(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("packs") / "under_another_name"
    pack(PackOptions(SAMPLE_DATA, place))
    return place


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_sample_data_give_the_same_batches(sample_pack, byte_tokenizer, split):
    choices = {
        "sample": replace(SMALL, max_tokens=8000),
        "buckets": BucketConfig(tiles=(1, 3, 5, 10)),
        "training": split == "train",
    }
    plain, ours = (
        open_pipeline(find_datasets(root, split, balance_to=0), byte_tokenizer, **choices)
        for root in (SAMPLE_DATA, sample_pack)
    )
    assert ours.fingerprint == plain.fingerprint
    assert [record.name for record in ours.mixture.records] == [
        record.name for record in plain.mixture.records
    ]
    steps = range(0, plain.steps_per_epoch, 1 + plain.steps_per_epoch // 40)
    assert digests(map(ours.read, steps)) == digests(map(plain.read, steps))


def test_what_was_packed_is_checked_as_the_folder_is(sample_pack):
    report = validate(ValidateOptions(sample_pack))
    assert not report.problems
    for split in ("train", "val", "test"):
        datasets = find_datasets(SAMPLE_DATA, split)
        sizes = {
            config.title: size
            for config, (_, size, _) in zip(datasets, read_mixture(datasets).sizes, strict=True)
        }
        assert sizes == {
            row.title: row.records[split] for row in report.datasets.values() if row.records[split]
        }


def test_an_interrupted_pack_goes_on_and_ends_the_same(mixture, tmp_path, monkeypatch):
    root, out = Path(mixture[0].root), tmp_path / "out" / "liver"
    whole = pack(PackOptions(root, tmp_path / "whole" / "liver", shard_bytes=8000))
    write, written = pack_room.write_shard, []

    def interrupted(path, files):
        if len(written) == 2:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, files)

    monkeypatch.setattr(pack_room, "write_shard", interrupted)
    options = PackOptions(root, out, shard_bytes=8000, threads=1)
    with pytest.raises(KeyboardInterrupt):
        pack(options)
    assert not out.exists()
    monkeypatch.setattr(pack_room, "write_shard", write)
    report = pack(options)
    assert report.kept == 2 < report.shards == whole.shards
    assert contents(out) == contents(tmp_path / "whole" / "liver")
    assert [path.name for path in out.parent.iterdir()] == ["liver"]


def test_a_file_that_changed_since_is_packed_again(targets, tmp_path, monkeypatch):
    options = PackOptions(targets, tmp_path / "out" / "liver", shard_bytes=8000, threads=1)
    monkeypatch.setattr(pack_room, "write_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(options)  # when all shards are written
    monkeypatch.undo()
    save_picture(targets / "train" / "0.png", seed=9)
    report = pack(options)
    assert report.kept == report.shards - 1
    (record, *_) = read_mixture(find_datasets(options.out)).records
    assert record.images[0].read_bytes() == (targets / "train" / "0.png").read_bytes()


def test_rows_are_read_when_their_turn_comes_and_texts_measured_once(
    mixture, byte_tokenizer, tmp_path, monkeypatch
):
    datasets = packed_mixture(mixture, tmp_path / "packed")
    first = open_pipeline(datasets, byte_tokenizer)
    monkeypatch.setattr(SampleBuilder, "_measure", lambda *_: pytest.fail("the texts are measured again"))
    read, rows = packed_room.read_range, []
    monkeypatch.setattr(packed_room, "read_range", lambda *args: rows.append(args) or read(*args))
    again = open_pipeline(datasets, byte_tokenizer)
    assert len(rows) == len(datasets)  # the first record of each
    assert again.fingerprint == first.fingerprint
    rows.clear()
    again.read(0)
    assert len(rows) == 4


def test_lengths_that_are_damaged_or_cannot_be_kept_are_measured(
    mixture, byte_tokenizer, tmp_path, monkeypatch, caplog
):
    datasets = packed_mixture(mixture[:1], tmp_path / "packed")
    fingerprint = open_pipeline(datasets, byte_tokenizer).fingerprint
    (kept,) = Path(datasets[0].root).glob("*.lengths-*")
    for damaged in (kept.read_bytes()[:-3], b""):
        kept.write_bytes(damaged)
        assert open_pipeline(datasets, byte_tokenizer).fingerprint == fingerprint
    kept.unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packed_room, "write_beside", refuse)
    with caplog.at_level(logging.WARNING):
        assert open_pipeline(datasets, byte_tokenizer).fingerprint == fingerprint
    assert "measured at every start" in caplog.text and not kept.exists()


def test_texts_may_be_measured_while_packing(tmp_path, monkeypatch):
    pack(PackOptions(SAMPLE_DATA, tmp_path / "packed", tokenizer=MICRO))
    tokenizer = Tokenizer.from_folder(MICRO)
    builder = SampleBuilder(SampleConfig(), SIZES, tokenizer, 42)
    datasets = [
        config for split in ("train", "val", "test") for config in find_datasets(tmp_path / "packed", split)
    ]
    assert len(datasets) > 3

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(SampleBuilder, "_measure", refuse)
    for config in datasets:
        records = PackedRecords(config)
        measured = list(map(builder.text_length, records))
        assert builder.text_lengths(records).tolist() == measured


def test_packing_that_ends_while_texts_are_measured_keeps_its_shards(targets, tmp_path, monkeypatch):
    options = PackOptions(targets, tmp_path / "packed", tokenizer=MICRO)
    with monkeypatch.context() as once:
        once.setattr(pack_room, "_measure_texts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(options)
    report = pack(options)
    assert report.kept == report.shards > 0


def test_packing_with_no_tokenizer_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        pack(PackOptions(SAMPLE_DATA, tmp_path / "packed", tokenizer=tmp_path))
    assert not list(tmp_path.iterdir())


def test_processes_measure_what_one_does(mixture, byte_tokenizer, tmp_path, monkeypatch, caplog):
    datasets = packed_mixture(mixture[:1], tmp_path / "packed")
    records, builder = PackedRecords(datasets[0]), SampleBuilder(SMALL, SIZES, byte_tokenizer, 0)
    alone = builder._measure(records)
    monkeypatch.setattr(transforms, "_SHARE", 2)
    assert builder._measure(records).tolist() == alone.tolist() and len(alone) == 5
    assert "Measuring the texts of 5 records of" in caplog.text and "data pack --tokenizer" in caplog.text


def rewrite(folder: Path, edit, *, true_checksum: bool) -> None:
    """Change the index of a packed folder."""
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    if true_checksum:
        index["sha256"] = packed_room._digest_of(index["content"])
    (folder / INDEX).write_text(json.dumps(index))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "missing shard": (
        lambda folder: (folder / "files-00000.arrayrecord").unlink(),
        r"files-00000\.arrayrecord of a packed dataset is missing; copy it again",
    ),
    "truncated shard": (
        lambda folder: (folder / "files-00000.arrayrecord").write_bytes(b"short"),
        r"files-00000\.arrayrecord of a packed dataset has 5 bytes instead of \d+; copy it again",
    ),
    "truncated rows": (
        lambda folder: (folder / "train.json.rows").write_bytes(b""),
        r"train\.json\.rows of a packed dataset has 0 bytes instead of \d+",
    ),
    "damaged rows": (
        lambda folder: flip(folder / "train.json.rows", 4),
        r"The checksum of row 0 of .*train\.json\.rows is wrong; copy it again",
    ),
    "damaged columns": (
        lambda folder: flip(folder / "train.json.columns.npy", -2),
        r"The checksum of .*train\.json\.columns\.npy is wrong; copy it again",
    ),
    "missing columns": (
        lambda folder: (folder / "train.json.columns.npy").unlink(),
        r"train\.json\.columns\.npy .*is missing",
    ),
    "another version": (
        lambda folder: rewrite(folder, lambda index: index.update(version=VERSION + 1), true_checksum=False),
        rf"packed\.json is of version {VERSION + 1} but this program reads {VERSION}; pack the dataset again",
    ),
    "edited index": (
        lambda folder: rewrite(
            folder, lambda index: index["content"].update(name="other"), true_checksum=False
        ),
        r"packed\.json is damaged; copy it again",
    ),
    "truncated index": (
        lambda folder: (folder / INDEX).write_text('{"ver'),
        r"packed\.json is not valid JSON",
    ),
    "no index": (lambda folder: (folder / INDEX).write_text("[]"), r"packed\.json is damaged"),
    "a shard elsewhere": (
        lambda folder: rewrite(
            folder,
            lambda index: index["content"]["shards"].update({"../secret": {"bytes": 1, "sha256": ""}}),
            true_checksum=True,
        ),
        r"packed\.json names \.\./secret, which is not in its folder; copy it again",
    ),
    "no such table": (
        lambda folder: rewrite(
            folder,
            lambda index: index["content"]["tables"].update(
                {"val.json": index["content"]["tables"].pop("train.json")}
            ),
            true_checksum=True,
        ),
        r"packed without train\.json for segmentation; it holds val\.json \(segmentation/disease/region\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence_at_the_start(targets, tmp_path, byte_tokenizer, damage):
    edit, message = DAMAGE[damage]
    pack(PackOptions(targets, tmp_path / "packed"))
    edit(tmp_path / "packed")
    with pytest.raises(InputError, match=message) as caught:
        open_pipeline([DatasetConfig(Kind.SEGMENTATION, str(tmp_path / "packed"))], byte_tokenizer)
    assert "\n" not in str(caught.value)


def test_other_folders_of_images_than_those_packed_are_refused(targets, tmp_path):
    pack(PackOptions(targets, tmp_path / "packed"))
    with pytest.raises(InputError, match=r"packed with its images in 'train', but .* asks for .*pictures"):
        read_mixture([DatasetConfig(Kind.REGION, str(tmp_path / "packed"), images="pictures")])


def test_a_damaged_file_is_unreadable_as_in_a_folder_and_found_by_the_check(
    targets, tmp_path, byte_tokenizer
):
    pack(PackOptions(targets, tmp_path / "packed"))
    shard = tmp_path / "packed" / "files-00000.arrayrecord"
    datasets = find_datasets(tmp_path / "packed", balance_to=0)
    record = read_mixture(datasets).records[2]
    flip(shard, record.images[0].start + 30)
    batches = iter(open_pipeline(datasets, byte_tokenizer, max_unreadable=0.5, training=False))
    assert sum(bool(name) for batch in batches for name in batch.names) == 4
    ((name, reason),) = batches.unreadable.items()
    assert name == record.name and "The checksum of" in reason and "2.png in the shard" in reason
    report = validate(ValidateOptions(tmp_path / "packed"))
    ((problem,),) = [report.errors]
    assert problem.sort == "damaged" and "files-00000.arrayrecord is wrong" in problem.text


def test_an_empty_file_says_so_in_both(targets, tmp_path, byte_tokenizer):
    (targets / "train" / "2.png").write_bytes(b"")
    table = json.loads((targets / "train.json").read_text())
    for image in table["images"]:
        image |= {"width": 60, "height": 30}
    (targets / "train.json").write_text(json.dumps(table))
    pack(PackOptions(targets, tmp_path / "packed"))
    reasons = []
    for root in (targets, tmp_path / "packed"):
        dataset = DatasetConfig(Kind.SEGMENTATION, str(root), name="a", balance_to=0)
        batches = iter(open_pipeline([dataset], byte_tokenizer, max_unreadable=0.5, training=False))
        list(batches)
        reasons += [reason.replace(str(root), "") for reason in batches.unreadable.values()]
    assert reasons == ["/train/2.png is an empty file; copy it again from its source."] * 2


def test_what_cannot_be_packed_is_refused(targets, tmp_path):
    out = tmp_path / "out" / "liver"
    with pytest.raises(InputError, match="nothing does not exist"):
        pack(PackOptions(tmp_path / "nothing", out))
    (targets / "train_mask" / "3_liver.png").unlink()
    with pytest.raises(InputError, match=r"needs the file .*3_liver\.png"):
        pack(PackOptions(targets, out))
    shutil.copy(targets / "train_mask" / "2_liver.png", targets / "train_mask" / "3_liver.png")
    shutil.copytree(targets, tmp_path / "other")
    with pytest.raises(
        InputError, match=r"\.liver\.partial holds the beginning of a pack of .*/liver; delete"
    ):
        pack(PackOptions(tmp_path / "other", out))
    with open(out.with_name(".liver.partial") / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"Another process is writing .*\.liver\.partial"):
            pack(PackOptions(targets, out))
    pack(PackOptions(targets, out))
    with pytest.raises(InputError, match=r"out/liver exists; choose another folder"):
        pack(PackOptions(targets, out))
    with pytest.raises(InputError, match=r"out/liver is packed already"):
        pack(PackOptions(out, tmp_path / "again"))
    with pytest.raises(InputError, match="shard_bytes=0"):
        PackOptions(targets, out, shard_bytes=0)
