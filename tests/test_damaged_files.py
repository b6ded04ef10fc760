"""Damaged and odd files by the hundred: every reader gives a result, or refuses in one sentence.

In bounded time and memory, without a traceback, and without a file outside the folders it was given. Every
case has a number, from which its damage is drawn; a failure names it.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from damage import damage, damage_json, odd_name
from PIL import Image
from places import MICRO
from small_datasets import coco_table, save_picture, save_square, write_table

from unibiomed_jax import InputError, checkpoint, files
from unibiomed_jax.conversion import from_torch, reading, sources
from unibiomed_jax.conversion.options import FromTorchOptions
from unibiomed_jax.data.mixture import find_datasets, read_mixture
from unibiomed_jax.data.records import Record
from unibiomed_jax.data.tables import read_dataset
from unibiomed_jax.datasets.build import BuildOptions, build
from unibiomed_jax.datasets.pack import PackOptions, pack
from unibiomed_jax.inputs.images import open_image
from unibiomed_jax.inputs.masks import open_mask
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.inputs.volumes import load_labels, load_nifti
from unibiomed_jax.parameters import flatten

SECONDS = 20  # for one file, on a machine that is busy with other tests
MEMORY = 1 << 30  # beyond what the process has already
MEMORY_WITH_THREADS = 16 << 30  # addresses, of which a thread reserves many and uses few


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path):
    """The folders beside the given one stay as they were."""
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "kept").write_text("kept")
    yield
    assert sorted(p.name for p in tmp_path.iterdir()) in (["beside"], ["beside", "given"])
    assert [p.name for p in beside.iterdir()] == ["kept"] and (beside / "kept").read_text() == "kept"


@pytest.fixture
def given(tmp_path) -> Path:
    folder = tmp_path / "given"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def limits(memory: int):
    """A time and an amount of memory that no small file can need."""

    def too_long(*_):
        raise TimeoutError(f"longer than {SECONDS} seconds")

    pages = (
        int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else None
    )
    before, alarm = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_long)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)


def try_all(count: int, name: str, attempt, memory: int = MEMORY) -> None:
    """Call attempt(rng) for every number; each ends in a result or in a sentence, some in either."""
    refused, failed = 0, []
    for number in range(count):
        try:
            with limits(memory), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt(random.Random(f"{name} {number}"))
        except InputError as error:
            refused += 1
            said = str(error)
            if not said.rstrip().endswith((".", "?")) or "\n" in said or not files.is_text(said):
                failed.append(f"{name} {number}: no sentence: {said!r}")
        except BaseException as error:  # TimeoutError, MemoryError, whatever a parser raises
            if isinstance(error, KeyboardInterrupt):
                raise
            failed.append(f"{name} {number}: {type(error).__name__}: {str(error)[:300]}")
    assert not failed, f"{len(failed)} of {count}:\n" + "\n".join(failed[:20])
    assert 0 < refused < count, f"{refused} of {count} were refused: the damage proves nothing"


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """A small picture in every format that is common, and in every mode of it."""
    values = np.random.default_rng(0).integers(0, 256, (18, 25, 4), np.uint8)
    rgb, grey = Image.fromarray(values[..., :3]), Image.fromarray(values[..., 0])
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 200)
    modes = (
        rgb,
        grey,
        rgb.convert("P"),
        Image.fromarray(values),
        grey.convert("1"),
        grey.convert("LA"),
        deep,
    )
    return [
        *(encoded(image, "PNG") for image in modes),
        *(
            encoded(image, "TIFF", compression=kind)
            for image in modes
            for kind in (None, "tiff_lzw", "tiff_deflate")
        ),
        encoded(rgb, "TIFF", compression="jpeg"),
        encoded(grey.convert("F"), "TIFF"),
        encoded(rgb, "JPEG"),
        encoded(grey, "JPEG", progressive=True),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(rgb, "WEBP", lossless=True),
        encoded(rgb, "GIF"),
        encoded(rgb, "BMP"),
        encoded(grey, "BMP"),
        encoded(rgb, "PPM"),
        encoded(deep, "PPM"),
        encoded(rgb, "TGA"),
    ]


def masks() -> list[bytes]:
    mask = np.zeros((18, 25), np.uint8)
    mask[4:9, 3:12] = 255
    image = Image.fromarray(mask)
    palette = image.convert("P")
    return [
        encoded(image, "PNG"),
        encoded(image.convert("1"), "PNG"),
        encoded(palette, "PNG"),
        encoded(image.convert("RGB"), "PNG"),
        encoded(Image.merge("LA", (image, image)), "PNG"),
        encoded(Image.fromarray(mask.astype(np.uint16) * 257), "PNG"),
        encoded(image, "TIFF", compression="tiff_lzw"),
        encoded(image, "BMP"),
        encoded(image, "JPEG", quality=95),
    ]


def test_images(given):
    originals = pictures()

    def attempt(rng):
        (given / "image.png").write_bytes(damage(rng.choice(originals), rng))
        image, _ = open_image(given / "image.png")
        assert image.mode == "RGB" and np.asarray(image).size

    try_all(400, "image", attempt)


def test_masks(given):
    originals = masks()

    def attempt(rng):
        (given / "mask.png").write_bytes(damage(rng.choice(originals), rng))
        mask = open_mask(given / "mask.png")
        assert mask.dtype == bool and mask.ndim == 2 and mask.size

    try_all(200, "mask", attempt)


def tables() -> dict[str, dict]:
    """A table of every kind."""
    size = {"height": 30, "width": 60}
    finding = {"image_file": "train/0.png", "abnormality": ["a cyst", "no findings"], "anatomy": "liver",
               "mask_file": ["0_a.png", "0_b.png"], "report": "A cyst in the liver.", **size}  # fmt: skip
    expression = {"exp": "liver in abdomen CT", "mask_file": ["0_liver.png", "1_liver.png"]}
    volume = {"slices": ["0.png", "1.png"], "expressions": {"0": expression}, **size}
    return {
        "train.json": coco_table(2, height=30, width=60),
        "train_disease.json": coco_table(2),
        "train_region.json": coco_table(2),
        "train_parse.json": {"a": finding, "b": finding},
        "train_captions.json": {
            "images": [{"file_name": "0.png", **size}],
            "annotations": [{"file_name": "0.png", "caption": "A liver.", "question": "What is it?"}],
        },
        "meta_train.json": {"volumes": {"case": volume}},
    }


def test_tables(given):
    originals = tables()
    save_picture(given / "train" / "0.png")
    save_square(given / "train_mask" / "0_liver.png")

    def attempt(rng):
        name = rng.choice(list(originals))
        (given / name).write_bytes(damage_json(originals[name], rng))
        try:
            problems: list[str] | None = rng.choice((None, []))
            for dataset in find_datasets(given, "train"):
                for record in read_dataset(dataset, problems):
                    assert isinstance(record, Record) and files.is_text(record.name)
            if problems:
                raise InputError(problems[0])
        finally:
            (given / name).unlink()

    try_all(300, "table", attempt)


def test_packed(given):
    """A packed dataset gives the records, files and text lengths that were packed, or none."""
    source, original = given / "source", given / "original"
    for number in range(3):
        save_picture(source / "train" / f"{number}.png", seed=number)
        save_square(source / "train_mask" / f"{number}_liver.png")
    write_table(source / "train.json", coco_table(3))
    pack(PackOptions(source, original))

    def content(folder):
        (records,) = read_mixture(find_datasets(folder, "train", balance_to=0)).records.parts
        lengths = records.text_lengths("a tokenizer", lambda _: np.array([7, 8, 9], np.int32)).tolist()
        return lengths, [
            (record.name, record.texts, record.size, [file.read_bytes() for file in (*record.images, *masks)])
            for record in records
            for masks in record.masks
        ]

    expected = content(original)  # and from here on the lengths lie beside the tables
    victims = sorted(path.name for path in original.iterdir())
    assert {path.rsplit(".", 1)[1] for path in victims} == {"json", "rows", "npy", "npz", "arrayrecord"}

    def attempt(rng):
        folder = copied(original, given / "damaged")
        change_one(folder / rng.choice(victims), rng)
        assert content(folder) == expected

    try_all(300, "packed", attempt)


def test_json(given):
    def attempt(rng):
        (given / "a.json").write_bytes(damage_json(coco_table(2), rng))
        value = files.read_json(given / "a.json")
        json.dumps(value, ensure_ascii=False).encode()  # can be written again

    try_all(100, "json", attempt)


def test_nifti(given):
    nibabel = pytest.importorskip("nibabel")
    originals = []
    for dtype in (np.int16, np.float32, np.uint8):
        voxels = np.random.default_rng(0).integers(0, 100, (5, 4, 3)).astype(dtype)
        for image in (nibabel.Nifti1Image(voxels, np.eye(4)), nibabel.Nifti2Image(voxels, np.eye(4))):
            originals.append(image.to_bytes())

    def attempt(rng):
        data = damage(rng.choice(originals), rng)
        path = given / "a.nii"
        if rng.random() < 0.3:
            import gzip

            path = given / "a.nii.gz"
            data = gzip.compress(data) if rng.random() < 0.5 else damage(gzip.compress(data), rng)
        path.write_bytes(data)
        voxels, affine = rng.choice((load_nifti, load_labels))(path)
        assert voxels.ndim == 3 and affine.shape == (4, 4)

    try_all(200, "nifti", attempt)


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def change_one(path: Path, rng: random.Random) -> None:
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_bytes(damage_json(json.loads(path.read_text()), rng))
    elif rng.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes(), rng))


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_tokenizers(given, form):
    names = [
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ]
    if form == "tokenizer.json":
        names = ["tokenizer.json", "tokenizer_config.json"]
    folder = given / "tokenizer"

    def attempt(rng):
        folder.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(MICRO / name, folder / name)
        change_one(folder / rng.choice(names), rng)
        tokenizer = Tokenizer.from_folder(folder, add_missing=True)
        assert isinstance(tokenizer.decode(tokenizer.encode("the liver [SEG]")), str)

    try_all(80, f"tokenizer {form}", attempt)


def small_safetensors() -> bytes:
    """A whole file of few bytes, so that damage meets its header as often as its numbers."""
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(32))


def test_safetensors(given):
    original = small_safetensors()
    length = int.from_bytes(original[:8], "little")
    header, numbers = json.loads(original[8 : 8 + length]), original[8 + length :]
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}

    def attempt(rng):
        text = damage_json(header, rng)
        data = (
            damage(original, rng) if rng.random() < 0.3 else len(text).to_bytes(8, "little") + text + numbers
        )
        for path in given.iterdir():
            path.unlink()
        if rng.random() < 0.4:
            (given / "one.safetensors").write_bytes(original)
            (given / reading.INDEX).write_bytes(damage_json(index, rng))
        else:
            (given / "model.safetensors").write_bytes(data)
        for tensor in reading.read_folder(given).values():
            assert tensor.read().shape == tensor.shape

    try_all(200, "safetensors", attempt)


@pytest.mark.slow
def test_releases(given):
    """A released checkpoint whose config.json or index was changed converts whole or not at all."""
    folder = copied(MICRO, given / "release")

    def attempt(rng):
        values = json.loads((MICRO / "config.json").read_text())
        (folder / "config.json").write_bytes(damage_json(values, rng))
        options = FromTorchOptions(folder, given / "out")
        try:
            from_torch.convert(from_torch.open_source(options), options.dst)
            checkpoint.load(options.dst)
        finally:
            assert sorted(p.name for p in given.iterdir()) in (["out", "release"], ["release"])
            shutil.rmtree(options.dst, ignore_errors=True)

    try_all(50, "release", attempt, MEMORY_WITH_THREADS)


@pytest.mark.slow
def test_checkpoints(given, tmp_path):
    """A checkpoint gives the numbers that were written, or none."""
    original = given / "original"
    from_torch.convert(sources.released(MICRO), original)
    written = {path: np.asarray(leaf) for path, leaf in flatten(checkpoint.load(original).params).items()}
    small = [p for p in sorted(original.rglob("*")) if p.is_file()]
    named = [p for p in small if p.parent == original]

    def attempt(rng):
        folder = copied(original, given / "damaged")
        victim = rng.choice(named if rng.random() < 0.5 else small)
        change_one(folder / victim.relative_to(original), rng)
        loaded = checkpoint.load(folder)
        for path, leaf in flatten(loaded.params).items():
            np.testing.assert_array_equal(np.asarray(leaf), written[path], err_msg=path)

    try_all(80, "checkpoint", attempt, MEMORY_WITH_THREADS)
    shutil.rmtree(original)
    shutil.rmtree(given / "damaged")


def test_names(given):
    """Images and masks of any name make a dataset that reads back, or are refused, without a partial one."""

    def attempt(rng):
        names = {odd_name(rng) for _ in range(2)}
        for kind in ("images", "masks"):
            shutil.rmtree(given / kind, ignore_errors=True)
            (given / kind).mkdir()
        for name in sorted(names):
            stem = os.fsdecode(name)
            try:
                save_picture(given / "images" / f"{stem}.png", size=(8, 6))
                save_square(given / "masks" / f"{stem}_liver.png", size=(8, 6), corner=(1, 1), side=3)
            except OSError:  # longer than this file system allows
                return
        out = given / "out"
        try:
            build(BuildOptions(out, "CT", "abdomen", given / "images", given / "masks", fractions=(1, 0, 0)))
            for dataset in find_datasets(out, "train"):
                assert len(read_dataset(dataset)) >= 1
        finally:
            shutil.rmtree(out, ignore_errors=True)
            assert sorted(p.name for p in given.iterdir()) == ["images", "masks"]

    try_all(150, "name", attempt)
