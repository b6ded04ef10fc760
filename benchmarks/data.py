"""Samples a second of the data pipeline on this machine, for images of 1, 10 and 13 tiles at full size.

python benchmarks/data.py                     # how fast
python benchmarks/data.py --step-seconds 4.2  # and what share of a training step that is
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unibiomed_jax.config.model import ModelConfig  # noqa: E402
from unibiomed_jax.data.pipeline import Pipeline, PipelineConfig  # noqa: E402
from unibiomed_jax.data.plan import BucketConfig  # noqa: E402
from unibiomed_jax.data.records import DatasetConfig, Kind  # noqa: E402
from unibiomed_jax.data.transforms import SampleConfig, SampleSizes  # noqa: E402
from unibiomed_jax.inputs.tokenizer import Tokenizer  # noqa: E402

# Width and height that are cut into so many tiles, thumbnail included.
IMAGES = {1: (512, 512), 10: (1024, 1024), 13: (600, 800)}
TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "micro" / "checkpoint"


def write_dataset(folder: Path, size: tuple[int, int], count: int = 8) -> DatasetConfig:
    """PNG images with the noise of real ones, which costs as much to decode, and one round mask each."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    images, annotations = [], []
    for name in ("train", "train_mask"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        base = 128 + 90 * np.sin(columns / 37 + number) * np.cos(rows / 53)
        pixels = np.clip(base[..., None] + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
        mask = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 5) ** 2
        Image.fromarray(pixels).save(folder / "train" / f"{number}.png")
        Image.fromarray(mask).save(folder / "train_mask" / f"{number}_liver.png")
        images.append({"file_name": f"{number}.png", "width": width, "height": height})
        sentences = [{"raw": "liver in abdomen CT"}]
        annotations.append(
            {"file_name": f"{number}.png", "mask_file": f"{number}_liver.png", "sentences": sentences}
        )
    (folder / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return DatasetConfig(Kind.SEGMENTATION, str(folder))


def measure(config: PipelineConfig, tokenizer: Tokenizer, seconds: float) -> float:
    """Samples a second after the first batches, over at least `seconds`."""
    batches = iter(Pipeline(config, SampleSizes.of(ModelConfig()), tokenizer))
    for _ in range(2 * max(1, config.workers)):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches).names)
    rate = count / (time.perf_counter() - start)
    batches.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=0, help="reading processes (0: threads)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="reading threads of a process")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--step-seconds", type=float, help="duration of a training step of one batch")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_folder(TOKENIZER)
    print(f"{os.cpu_count()} cores, {options.workers} workers, {options.threads} threads")
    print("tiles  samples/s  s/batch" + ("  share of the step" if options.step_seconds else ""))
    for tiles, size in IMAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = PipelineConfig(
                (write_dataset(Path(folder) / "images", size),),
                SampleConfig(),
                options.batch_size,
                BucketConfig(),
                workers=options.workers,
                threads=options.threads,
            )
            rate = measure(config, tokenizer, options.seconds)
        batch = options.batch_size / rate
        share = f"  {batch / options.step_seconds:17.1%}" if options.step_seconds else ""
        print(f"{tiles:5d}  {rate:9.2f}  {batch:7.3f}{share}")


if __name__ == "__main__":
    main()
