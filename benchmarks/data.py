"""What the data pipeline of training gives on this machine: samples a second, and how soon a run starts.

python benchmarks/data.py                            # samples a second, from folders and from shards
python benchmarks/data.py --hosts 2                  # the same by two processes, each a host's share
python benchmarks/data.py --batch-size 32 --step-seconds 0.49   # is it enough for a v5e-16?
python benchmarks/data.py --start 5000000            # seconds and memory before the first batch

A step of 32 samples takes a v5e-16 0.08 s with one tile each, 0.38 s with 10 and 0.49 s with 13, at 40 % of
its peak and the operations that training/flops.py counts for UniBiomed-1B with adapters. That is arithmetic:
no such machine was measured, nor one with more cores than this: theirs are taken to be like these.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from qwen2_tokenizer import qwen2_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from unibiomed_jax.config.model import ModelConfig  # noqa: E402
from unibiomed_jax.data.mixture import find_datasets  # noqa: E402
from unibiomed_jax.data.packed import file_entry, to_row, write_index, write_rows  # noqa: E402
from unibiomed_jax.data.pipeline import Pipeline, PipelineConfig  # noqa: E402
from unibiomed_jax.data.records import DatasetConfig, Kind, Record  # noqa: E402
from unibiomed_jax.data.transforms import SampleConfig, SampleSizes  # noqa: E402
from unibiomed_jax.datasets.pack import PackOptions, pack  # noqa: E402
from unibiomed_jax.inputs.shards import write_shard  # noqa: E402
from unibiomed_jax.inputs.tokenizer import Tokenizer  # noqa: E402

# Width and height that are cut into so many tiles, thumbnail included.
IMAGES = {1: (512, 512), 10: (1024, 1024), 13: (600, 800)}
# Files that the records of the large dataset share, and records whose headers are read to extrapolate.
DISTINCT, LOOSE = 64, 20_000


def write_dataset(folder: Path, size: tuple[int, int], count: int = 8, noise: float = 6) -> None:
    """PNG images with the noise of real ones, which costs as much to decode, and one round mask each."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    for name in ("train", "train_mask"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        base = 128 + 90 * np.sin(columns / 37 + number) * np.cos(rows / 53)
        pixels = np.clip(base[..., None] + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8)
        mask = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 5) ** 2
        Image.fromarray(pixels).save(folder / "train" / f"{number}.png")
        Image.fromarray(mask).save(folder / "train_mask" / f"{number}_liver.png")
    write_table(folder, size, count)


def write_table(folder: Path, size: tuple[int, int] | None, count: int) -> None:
    sizes = {} if size is None else {"width": size[0], "height": size[1]}
    table = {
        "images": [{"file_name": f"{number}.png", **sizes} for number in range(count)],
        "annotations": [
            {
                "file_name": f"{number}.png",
                "mask_file": f"{number}_liver.png",
                "sentences": [{"raw": "liver in abdomen CT"}],
            }
            for number in range(count)
        ],
    }
    (folder / "train.json").write_text(json.dumps(table))


def write_loose(folder: Path, records: int) -> None:
    """So many images and masks as files of their own, none of whose sizes the table tells."""
    write_dataset(folder, (512, 512), DISTINCT, noise=0)
    for number in range(DISTINCT, records):
        for name, ending in (("train", ".png"), ("train_mask", "_liver.png")):
            source = folder / name / f"{number % DISTINCT}{ending}"
            shutil.copyfile(source, folder / name / f"{number}{ending}")
    write_table(folder, None, records)


def write_large(folder: Path, records: int) -> None:
    """A packed dataset of so many records: four in five have a caption of their own, the others a mask.

    It is what `unibiomed data pack` writes, but for the files: the records share a few.
    """
    with tempfile.TemporaryDirectory() as loose:
        write_dataset(Path(loose) / "images", (512, 512), DISTINCT)
        files = {
            name: [
                (Path(loose) / "images" / name / f"{number}{ending}").read_bytes()
                for number in range(DISTINCT)
            ]
            for name, ending in (("train", ".png"), ("train_mask", "_liver.png"))
        }
    folder.mkdir(parents=True)
    shard = "files-00000.arrayrecord"
    places = write_shard(folder / shard, [*files["train"], *files["train_mask"]]).tolist()
    captions = records * 4 // 5
    tables = {}
    for name, kind, first, last in (
        ("train_captions.json", Kind.CAPTION, 0, captions),
        ("train.json", Kind.SEGMENTATION, captions, records),
    ):
        config = DatasetConfig(kind, str(folder), name=f"large/{kind}")
        rows = (
            (to_row(record, config, lambda path: (0, *places[_number(path)])), (512, 512), len(record.masks))
            for record in _large_records(config, first, last)
        )
        tables[name] = write_rows(folder, name, rows, last - first) | {
            "digests": {str(kind): "made up"},
            "images": "." if kind is Kind.CAPTION else "train",
            "masks": "." if kind is Kind.CAPTION else "train_mask",
        }
    write_index(folder, {"name": "large", "tables": tables, "shards": {shard: file_entry(folder / shard)}})


def _number(path: str) -> int:
    """Which of the shared files stands for one of the large dataset: masks lie behind the images."""
    number = int(Path(path).stem.split("_")[0]) % DISTINCT
    return number + DISTINCT * path.endswith("_liver.png")


def _large_records(config: DatasetConfig, first: int, last: int) -> Iterator[Record]:
    words = (
        "the left upper lower lobe shows a mass with irregular margin and uniform texture near vessel".split()
    )
    root = Path(config.root)
    for number in range(first, last):
        image = f"{root}/train/{number}.png"
        name = f"{config.title}:train/{number}"
        if config.kind is Kind.CAPTION:
            state = number * 2654435761 % 2**32
            drawn = [words[(state >> shift) % len(words)] for shift in range(0, 30)]
            text = f"Image {number}: {' '.join(drawn)}, {number % 97} mm, {' '.join(reversed(drawn))}."
            yield Record(name, config.kind, (image,), texts=(text,))
        else:
            mask = f"{root}/train_mask/{number}_liver.png"
            yield Record(name, config.kind, (image,), ((mask,),), ("liver in abdomen CT",))


def rate(root: Path, options: argparse.Namespace, tokenizer: Tokenizer) -> float:
    """Samples a second after the first batches, over at least `seconds`: this host's share of every batch."""
    config = PipelineConfig(
        find_datasets(root),
        SampleConfig(),
        options.batch_size,
        workers=options.workers,
        threads=options.threads,
    )
    host, hosts = options.host or 0, options.hosts
    pipeline = Pipeline(config, SampleSizes.of(ModelConfig()), tokenizer, host=host, hosts=hosts)
    batches = iter(pipeline)
    for _ in range(2 * max(1, config.workers)):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds:
        count += len(next(batches).names)
    found = count / (time.perf_counter() - start)
    batches.close()
    return found


def rates(root: Path, options: argparse.Namespace, tokenizer: Tokenizer) -> float:
    """`rate`, summed over all hosts, which are processes of this machine if there are several."""
    if options.hosts == 1:
        return rate(root, options, tokenizer)
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(root), "--host"]
    hosts = [
        subprocess.Popen([*command, str(host)], stdout=subprocess.PIPE, text=True)
        for host in range(options.hosts)
    ]
    return sum(float(host.communicate()[0]) for host in hosts)


def start(root: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Seconds until the pipeline is ready and until its first batch is there; peak memory of this process."""
    began = time.perf_counter()
    config = PipelineConfig(find_datasets(root), batch_size=16)
    pipeline = Pipeline(config, SampleSizes.of(ModelConfig()), tokenizer)
    ready = time.perf_counter()
    pipeline.read(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    return {"ready": ready - began, "first batch": time.perf_counter() - began, "MiB": peak}


def measure_start(records: int, folder: Path) -> None:
    """Print how a run over so many records starts."""
    began = time.perf_counter()
    write_large(folder / "large", records)
    write_loose(folder / "loose", LOOSE)
    print(f"{records:,} records written in {time.perf_counter() - began:.0f} s; {os.cpu_count()} cores")
    print("what                                              ready s  first batch s  peak MiB")
    found = {}
    for label, name in (
        (f"folder, every header read, {LOOSE:,} records", "loose"),
        (f"packed, {records:,} records, lengths not yet known", "large"),
        (f"packed, {records:,} records", "large"),
    ):
        command = [sys.executable, __file__, "--start", str(records), "--folder", str(folder / name)]
        told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        found[label] = told
        print(
            f"{label:48s}  {told['ready']:7.1f}  {told['first batch']:13.1f}  {told['MiB']:8,.0f}", flush=True
        )
    loose = next(iter(found.values()))["ready"]
    print(f"a folder of {records:,} records at that rate: {loose * records / LOOSE:,.0f} s")


def measure_rates(options: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Print samples a second, from a folder and packed."""
    print(
        f"{os.cpu_count()} cores, {options.hosts} hosts with {options.workers} workers of {options.threads} "
        "threads each"
    )
    print(
        "tiles  from     samples/s  s/batch" + ("  does it feed the chips?" if options.step_seconds else "")
    )
    for tiles, size in IMAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            loose, packed = Path(folder) / "images", Path(folder) / "packed"
            write_dataset(loose, size)
            pack(PackOptions(loose, packed))
            for label, root in (("folder", loose), ("packed", packed)):
                found = rates(root, options, tokenizer)
                line = f"{tiles:5d}  {label:7s}  {found:9.2f}  {options.batch_size / found:7.3f}"
                if options.step_seconds:
                    line += "  " + enough(found, options)
                print(line, flush=True)


def enough(samples: float, options: argparse.Namespace) -> str:
    """Whether hosts with these cores would keep the chips busy."""
    wanted = options.batch_size / options.step_seconds
    hosts = options.chips / options.chips_per_host
    given = samples / os.cpu_count() * options.cores * hosts
    says = "enough" if given >= wanted else "NOT enough"
    return (
        f"{options.chips} chips take {wanted:.1f} samples/s; {hosts:g} hosts of {options.cores} such cores "
        f"give {given:.1f}: {says}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=0, help="reading processes of a host (0: threads)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="reading threads of a process")
    parser.add_argument("--hosts", type=int, default=1, help="hosts, each a process of this machine")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch, all hosts together")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--step-seconds", type=float, help="duration of a training step of one batch")
    parser.add_argument("--chips", type=int, default=16, help="that take the step together (v5e-16: 16)")
    parser.add_argument("--chips-per-host", type=int, default=4)
    parser.add_argument("--cores", type=int, default=112, help="of such a host (v5e: 112 vCPU)")
    parser.add_argument("--start", type=int, metavar="RECORDS", help="measure how a run starts instead")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the processes it starts
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.start and not options.folder:
        with tempfile.TemporaryDirectory() as folder:
            measure_start(options.start, Path(folder))
    elif options.start:
        print(json.dumps(start(options.folder, qwen2_tokenizer())))
    elif options.host is not None:
        print(rate(options.folder, options, qwen2_tokenizer()))
    else:
        measure_rates(options, qwen2_tokenizer())


if __name__ == "__main__":
    main()
