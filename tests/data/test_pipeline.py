"""Batches: their order, their shapes, their state, and samples that cannot be read."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from small_datasets import SIZES, SMALL, coco_table, save_picture, save_square, write_table

from unibiomed_jax.data.mixture import Mixture
from unibiomed_jax.data.pipeline import Pipeline, PipelineConfig
from unibiomed_jax.data.plan import BatchPlan, BucketConfig, RecordShapes, permutation
from unibiomed_jax.data.records import DatasetConfig, Kind, Record
from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import Tokenizer

BUCKETS = BucketConfig(tiles=(1, 3, 5), text=(64, 160, 300), objects=(1, 2))


def config(mixture, **choices) -> PipelineConfig:
    return PipelineConfig(
        **{"datasets": mixture, "sample": SMALL, "batch_size": 4, "buckets": BUCKETS} | choices
    )


def take(pipeline, count):
    iterator = iter(pipeline)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_equal(first, second):
    assert (first.names, first.step) == (second.names, second.step)
    assert first.arrays.keys() == second.arrays.keys()
    for key, value in first.arrays.items():
        np.testing.assert_array_equal(value, second.arrays[key], err_msg=key)


@pytest.fixture
def pipeline(mixture, byte_tokenizer):
    return Pipeline(config(mixture), SIZES, byte_tokenizer)


def test_arrays_of_a_batch(pipeline):
    seen = {}
    for batch in take(pipeline, pipeline.steps_per_epoch):
        arrays = batch.arrays
        rows, tiles = arrays["tile_valid"].shape
        objects, frames = arrays["masks"].shape[1:3]
        tokens = arrays["input_ids"].shape[1]
        assert rows == 4 and len(batch.names) == 4
        assert arrays["pixel_values"].shape == (rows, tiles, 28, 28, 3)
        assert arrays["sam_pixels"].shape == (rows, frames, 64, 64, 3)
        assert arrays["masks"].shape == (rows, objects, frames, 16, 16)
        assert arrays["labels"].shape == arrays["token_valid"].shape == (rows, tokens)
        assert arrays["object_valid"].shape == (rows, objects)
        assert arrays["frame_valid"].shape == (rows, frames)
        for name in ("pixel_values", "sam_pixels", "masks"):
            assert arrays[name].dtype == np.uint8
        for row, name in enumerate(batch.names):
            kind = name.split("/")[1].split(":")[0]
            valid = arrays["token_valid"][row]
            length = valid.sum()
            assert valid[:length].all() and not arrays["input_ids"][row, length:].any()
            assert (arrays["labels"][row, length:] == -100).all() and (arrays["labels"][row] != -100).any()
            image_tokens = (arrays["input_ids"][row] == 280).sum()
            assert image_tokens == 4 * arrays["tile_valid"][row].sum()
            segs = (arrays["input_ids"][row] == 287).sum()
            assert segs == arrays["object_valid"][row].sum()
            assert not arrays["masks"][row][~arrays["object_valid"][row]].any()
            seen.setdefault(kind, set()).add((tiles, objects, frames))
    assert seen.pop("sequence") == {(3, 1, 3)}
    assert seen.pop("caption") == seen.pop("region") == {(1, 0, 0)}
    assert seen.pop("segmentation") == seen.pop("disease") == {(3, 1, 1)}
    assert seen.pop("vqa") == seen.pop("report") == {(3, 1, 1), (3, 2, 1)}


def test_an_epoch_has_every_sample_and_the_next_another_order(pipeline):
    samples = [pipeline.plan.rows(step).samples for step in range(2 * pipeline.steps_per_epoch)]
    first, second = np.split(np.array(samples), 2)
    assert set(first.flat) == set(second.flat) == set(range(len(pipeline.mixture.order)))
    assert first.tolist() != second.tolist()


def test_order_depends_on_seed_and_step_alone(mixture, byte_tokenizer):
    base = take(Pipeline(config(mixture), SIZES, byte_tokenizer), 6)
    for choices in ({"threads": 1, "prefetch": 5}, {"threads": 4}):
        for ours, theirs in zip(
            base, take(Pipeline(config(mixture, **choices), SIZES, byte_tokenizer), 6), strict=True
        ):
            assert_equal(ours, theirs)
    other = take(Pipeline(config(mixture, seed=43), SIZES, byte_tokenizer), 6)
    assert [batch.names for batch in other] != [batch.names for batch in base]


def test_workers_do_not_change_a_bit_and_leave_signals_to_the_main_process(mixture, byte_tokenizer):
    base = Pipeline(config(mixture), SIZES, byte_tokenizer)
    reader = iter(Pipeline(config(mixture, workers=2), SIZES, byte_tokenizer))
    reader.set_state({**iter(base).get_state(), "step": 2})
    for step in (2, 3):  # the first batch of either worker, so that both have started
        assert_equal(next(reader), base.read(step))
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    for step in range(4, 20):  # more than were read before the signals
        assert_equal(next(reader), base.read(step))
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    reader.close()
    assert not any(worker.is_alive() for worker in workers)


def plan_of(datasets, records, shapes, batch_size=4, **choices) -> BatchPlan:
    """Plan of datasets of so many records each, whose shapes come in turn."""
    names = [f"{dataset}/{number}" for dataset in range(datasets) for number in range(records)]
    mixture = Mixture(
        tuple(Record(name, Kind.CAPTION, (f"{name}.png",)) for name in names), np.arange(len(names)), (), ""
    )
    chosen = RecordShapes.of(
        np.array([(0, 0, 1, 64 * (1 + number % shapes)) for number in range(len(names))])
    )
    return BatchPlan(mixture, chosen, batch_size, **{"seed": 42} | choices)


def test_the_order_of_training_is_the_same_for_ever():
    plan = plan_of(2, 4, shapes=3, batch_size=2)
    batches = [plan.rows(step).samples.tolist() for step in range(2 * plan.batches_per_epoch)]
    assert batches == [[4, 7], [5, 2], [1, 4], [6, 3], [0, 6], [5, 2], [6, 3], [7, 1], [4, 7], [3, 0]]


def test_the_beginning_of_a_validation_shows_every_shape_and_most_datasets():
    """Twelve datasets of 25 samples of either shape."""
    plan = plan_of(12, 50, shapes=2, shuffle=False, repeat=False)
    steps = [plan.rows(step) for step in range(plan.batches_per_epoch)]
    assert sorted(np.concatenate([rows.samples for rows in steps])) == list(range(600))
    assert {rows.shape for rows in steps[:2]} == set(plan.shapes)
    first = np.concatenate([rows.samples for rows in steps[:8]]) // 50
    assert len(set(first)) >= 10
    other = plan_of(12, 50, shapes=2, shuffle=False, repeat=False, seed=1)
    assert [rows.samples.tolist() for rows in steps] == [
        other.rows(step + other.batches_per_epoch).samples.tolist() for step in range(len(steps))
    ]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_rows_of_every_batch(mixture, byte_tokenizer, hosts):
    whole = Pipeline(config(mixture), SIZES, byte_tokenizer)
    parts = [
        Pipeline(config(mixture), SIZES, byte_tokenizer, host=host, hosts=hosts) for host in range(hosts)
    ]
    for step in range(5):
        expected, batches = whole.read(step), [part.read(step) for part in parts]
        assert sum((batch.names for batch in batches), ()) == expected.names
        for key, value in expected.arrays.items():
            np.testing.assert_array_equal(np.concatenate([batch.arrays[key] for batch in batches]), value)
    with pytest.raises(InputError, match="batch_size=4 cannot be shared by 3 hosts"):
        Pipeline(config(mixture), SIZES, byte_tokenizer, hosts=3)


def test_state_continues_with_the_next_batch(pipeline):
    iterator = iter(pipeline)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(pipeline.steps_per_epoch)]
    iterator.set_state(state)
    for batch in expected:
        assert_equal(next(iterator), batch)
    fresh = iter(pipeline)
    fresh.set_state(state)
    assert_equal(next(fresh), expected[0])


def test_state_of_other_data_is_refused(mixture, byte_tokenizer):
    state = iter(Pipeline(config(mixture), SIZES, byte_tokenizer)).get_state()
    for choices in ({"seed": 1}, {"batch_size": 2}, {"datasets": mixture[:3]},
                    {"sample": replace(SMALL, text_only_max_tiles=2)}):  # fmt: skip
        with pytest.raises(InputError, match="belongs to other datasets"):
            iter(Pipeline(config(mixture, **choices), SIZES, byte_tokenizer)).set_state(state)
    for sizes in (replace(SIZES, max_tiles=1), replace(SIZES, sam_size=32, mask_size=8)):
        with pytest.raises(InputError, match="belongs to other datasets"):
            iter(Pipeline(config(mixture), sizes, byte_tokenizer)).set_state(state)
    iter(Pipeline(config(mixture, threads=1, prefetch=9), SIZES, byte_tokenizer)).set_state(state)


def test_the_fingerprint_is_of_all_that_decides_the_batches(targets, tmp_path, byte_tokenizer):
    def fingerprint(root=targets, tokenizer=byte_tokenizer, kind=Kind.SEGMENTATION):
        return Pipeline(config((DatasetConfig(kind, str(root)),)), SIZES, tokenizer).fingerprint

    shutil.copytree(targets, tmp_path / "elsewhere" / targets.name)
    seen = [fingerprint()]
    assert fingerprint(tmp_path / "elsewhere" / targets.name) == seen[0]

    more = json.loads(byte_tokenizer.backend.to_str())
    more["added_tokens"].append(
        {**more["added_tokens"][-1], "id": byte_tokenizer.vocab_size, "content": "?!"}
    )
    backend = tokenizers.Tokenizer.from_str(json.dumps(more))
    seen.append(fingerprint(tokenizer=Tokenizer(backend, eos=byte_tokenizer.eos, pad=byte_tokenizer.pad)))

    tables = [coco_table(5, sentence="Renal in abdomen CT."), coco_table(5)]
    tables[1]["annotations"][0]["file_name"] = "1.png"
    for table in (*tables, coco_table(5)):
        write_table(targets / "train.json", table)
        if table in tables:
            seen.append(fingerprint())
    # One image of one tile, then another one: the same shapes, of other records.
    for number in (0, 1):
        for other, size in ((number, (30, 30)), (1 - number, (60, 30))):
            save_picture(targets / "train" / f"{other}.png", size)
            save_square(targets / "train_mask" / f"{other}_liver.png", size)
        seen.append(fingerprint())
    for question in ("Is it?", "Was it"):
        asked = {"file_name": "train/0.png", "caption": "yes", "question": question}
        write_table(targets / "train.json", {"annotations": [asked]})
        seen.append(fingerprint(kind=Kind.CAPTION))
    assert len(set(seen)) == len(seen) == 8


def test_validation_goes_once_through_with_blank_rows(mixture, byte_tokenizer):
    pipeline = Pipeline(config(mixture), SIZES, byte_tokenizer, training=False)
    batches = list(pipeline)
    assert len(batches) == pipeline.steps_per_epoch
    names = [name for batch in batches for name in batch.names if name]
    records = [pipeline.mixture.records[number].name for number in pipeline.mixture.order]
    assert sorted(names) == sorted(records)
    assert names == [name for batch in pipeline for name in batch.names if name]
    blank = [(batch, row) for batch in batches for row, name in enumerate(batch.names) if not name]
    assert blank
    for batch, row in blank:
        assert batch.arrays["token_valid"][row].sum() == 1 and (batch.arrays["labels"][row] == -100).all()
        for key in ("tile_valid", "frame_valid", "object_valid", "masks", "pixel_values"):
            assert not batch.arrays[key][row].any()


def test_few_shapes_and_no_padding_of_tiles_beyond_the_bucket(pipeline):
    shapes = {
        tuple(value.shape for value in batch.arrays.values())
        for batch in take(pipeline, 2 * pipeline.steps_per_epoch)
    }
    assert len(shapes) == len(pipeline.plan.shapes)


def test_permutation_is_the_same_for_ever():
    assert permutation(8, 42, 0, 1).tolist() == [1, 6, 4, 2, 5, 7, 3, 0]
    drawn = np.array([permutation(5, seed, 0).tolist() for seed in range(4000)])
    # Every position holds every number about equally often.
    for column in drawn.T:
        counts = np.bincount(column, minlength=5)
        assert counts.min() > 700 and counts.max() < 900


def test_unreadable_samples_are_named_counted_and_replaced(mixture, targets, byte_tokenizer, caplog):
    pipeline = Pipeline(config(mixture, max_unreadable=0.2), SIZES, byte_tokenizer)
    bad = targets / "train" / "2.png"
    bad.write_bytes(bad.read_bytes()[:200])
    iterator = iter(pipeline)
    with caplog.at_level(logging.WARNING):
        batches = [next(iterator) for _ in range(3 * pipeline.steps_per_epoch)]
    names = {name for batch in batches for name in batch.names}
    assert len(iterator.unreadable) == 3 and all("2_liver.png" in name for name in iterator.unreadable)
    assert not any("2_liver.png" in name for name in names) and "" not in names
    assert sorted(record.args[0] for record in caplog.records) == sorted(iterator.unreadable)
    assert all("2.png is truncated" in reason for reason in iterator.unreadable.values())
    resumed = iter(pipeline)
    resumed.set_state(iterator.get_state())
    assert resumed.unreadable == iterator.unreadable


def test_too_many_unreadable_samples_stop_the_run(mixture, targets, byte_tokenizer):
    pipeline = Pipeline(config(mixture), SIZES, byte_tokenizer)
    save_square(targets / "train_mask" / "2_liver.png", size=(61, 30))  # while it trains
    iterator = iter(pipeline)
    with pytest.raises(InputError, match=r"1 of 24 records cannot be read.*2_liver\.png.*61x30"):
        for _ in range(pipeline.steps_per_epoch):
            next(iterator)


def test_an_image_that_has_another_size_than_at_the_start_is_unreadable(targets, byte_tokenizer):
    """Planned as one tile, it has three."""
    table = coco_table(5)
    table["images"][2] |= {"width": 30, "height": 30}
    write_table(targets / "train.json", table)
    save_picture(targets / "train" / "2.png", size=(30, 30))
    save_square(targets / "train_mask" / "2_liver.png", size=(30, 30))
    dataset = DatasetConfig(Kind.SEGMENTATION, str(targets), balance_to=0)
    pipeline = Pipeline(config((dataset,), max_unreadable=0.5), SIZES, byte_tokenizer, training=False)
    save_picture(targets / "train" / "2.png")
    iterator = iter(pipeline)
    assert sum(bool(name) for batch in iterator for name in batch.names) == 4
    assert list(iterator.unreadable) == ["liver/segmentation:train/2_liver.png"]


def test_nothing_readable_stops_at_once(targets, byte_tokenizer):
    dataset = DatasetConfig(Kind.SEGMENTATION, str(targets), balance_to=0)
    pipeline = Pipeline(config((dataset,), max_unreadable=1.0), SIZES, byte_tokenizer)
    for path in (targets / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="5 of 5 records cannot be read.*empty file"):
        next(iter(pipeline))


def test_an_unreadable_sample_without_another_of_its_shape_leaves_blank_rows(targets, byte_tokenizer):
    table = coco_table(5)
    table["annotations"][2]["sentences"] = [{"raw": "Liver " * 20}]
    write_table(targets / "train.json", table)
    dataset = DatasetConfig(Kind.SEGMENTATION, str(targets), balance_to=0)
    pipeline = Pipeline(config((dataset,), max_unreadable=0.2), SIZES, byte_tokenizer)
    (targets / "train" / "2.png").write_bytes(b"")
    iterator = iter(pipeline)
    batches = [next(iterator) for _ in range(2 * pipeline.steps_per_epoch)]
    blank = [batch for batch in batches if not any(batch.names)]
    assert len(batches) == 4 and len(blank) == 2 and len(iterator.unreadable) == 1
    for batch in blank:
        assert (batch.arrays["labels"] == -100).all() and not batch.arrays["object_valid"].any()


def test_what_is_wrong_is_said_before_the_first_batch(mixture, targets, byte_tokenizer):
    with pytest.raises(InputError, match=r"would lose a \[SEG\]"):
        Pipeline(config(mixture, sample=replace(SMALL, max_tokens=100)), SIZES, byte_tokenizer)
    with pytest.raises(InputError, match=r"findings.* has 2 objects but the largest bucket is 1"):
        Pipeline(config(mixture, buckets=replace(BUCKETS, objects=(1,))), SIZES, byte_tokenizer)
    with pytest.raises(
        InputError, match=r"has \d+ tokens before its answer, and max_tokens=12 would cut all"
    ):
        Pipeline(config(mixture[-1:], sample=replace(SMALL, max_tokens=12)), SIZES, byte_tokenizer)
    save_square(targets / "train_mask" / "3_liver.png", size=(61, 30))
    with pytest.raises(InputError, match=r"The mask .*3_liver\.png .* is 61x30 pixels but its image 60x30"):
        Pipeline(config(mixture), SIZES, byte_tokenizer)
    (targets / "train_mask" / "0_liver.png").unlink()
    with pytest.raises(InputError, match=r"needs the file .*0_liver\.png"):
        Pipeline(config(mixture), SIZES, byte_tokenizer)
    write_table(targets / "train.json", coco_table(5, width=30, height=30))
    save_square(targets / "train_mask" / "0_liver.png")
    with pytest.raises(
        InputError, match=r"0\.png of .* is 60x30 pixels \(upright\) but its table says 30x30"
    ):
        Pipeline(config(mixture), SIZES, byte_tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PipelineConfig((), seed=-1), "seed=-1 is impossible; give 0 or more"),
        (lambda: PipelineConfig((), workers=-1), "workers=-1"),
        (lambda: PipelineConfig((), threads=0), "threads=0 is impossible; give 1 or more"),
        (lambda: PipelineConfig((), prefetch=0), "prefetch=0"),
        (lambda: PipelineConfig((), max_unreadable=-1), "max_unreadable=-1 is impossible; give 0 to 1"),
        (lambda: PipelineConfig((), max_unreadable=float("nan")), "max_unreadable=nan"),
        (lambda: DatasetConfig(Kind.REGION, "scans", repeats=0), "repeats=0 of the dataset scans/region"),
        (lambda: DatasetConfig(Kind.REGION, "scans", balance_to=-1), "balance_to=-1 .* give 0 or more"),
        (lambda: DatasetConfig(Kind.SEQUENCE, "scans", slices=0), "slices=0 of the dataset scans/sequence"),
        (lambda: BucketConfig(tiles=()), r"buckets\.tiles=\(\) is impossible"),
        (lambda: BucketConfig(objects=(0, 1)), r"buckets\.objects=\(0, 1\) is impossible"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_words_that_stand_for_a_piece_of_the_image_are_refused(captions, byte_tokenizer):
    asked = {"file_name": "train/0.png", "caption": "a <IMG_CONTEXT> b"}
    save_picture(captions / "train" / "0.png")
    write_table(captions / "train.json", {"annotations": [asked]})
    dataset = DatasetConfig(Kind.CAPTION, str(captions), annotations="train.json", balance_to=0)
    with pytest.raises(InputError, match=r"0\.png: its words contain <IMG_CONTEXT>, .* remove it"):
        Pipeline(config((dataset,)), SIZES, byte_tokenizer)


def test_validation_leaves_the_row_of_an_unreadable_sample_blank(targets, byte_tokenizer):
    dataset = DatasetConfig(Kind.SEGMENTATION, str(targets), balance_to=0)
    pipeline = Pipeline(config((dataset,), max_unreadable=0.5), SIZES, byte_tokenizer, training=False)
    (targets / "train" / "1.png").write_bytes(b"")
    iterator = iter(pipeline)
    names = [name for batch in iterator for name in batch.names]
    assert names.count("") == 4 and len(names) == 8 and len(iterator.unreadable) == 1
