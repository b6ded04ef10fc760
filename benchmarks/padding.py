"""What padding costs the training of the published mixture: how much arithmetic no sample asks for.

python benchmarks/padding.py                                  # with the buckets of configs/unibiomed_1b.py
python benchmarks/padding.py --images mixed                   # and with images as they come, not of one size
python benchmarks/padding.py --tiles 1,5,10,13 --text 128     # other buckets

The mixture is simulated: the recipe's 93 datasets, with the project's own questions, answers, tokenizer,
buckets and batches, and no pixels. What is known of it and what is assumed is said at the constants below.
Arithmetic is counted as training/flops.py counts it. Padded are: text up to its bucket, tiles up to theirs,
the positions that the output head looks at up to whole chunks, and samples that are seen again to fill the
last batch of a shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from qwen2_tokenizer import qwen2_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from unibiomed_jax.data.mixture import Mixture, Records  # noqa: E402
from unibiomed_jax.data.plan import BatchPlan, BucketConfig, Shape, record_shapes  # noqa: E402
from unibiomed_jax.data.prompts import draw  # noqa: E402
from unibiomed_jax.data.records import DatasetConfig, Kind, Record  # noqa: E402
from unibiomed_jax.data.transforms import IGNORE, SampleBuilder, SampleSizes  # noqa: E402
from unibiomed_jax.inputs.tokenizer import Tokenizer  # noqa: E402
from unibiomed_jax.parameters import partition  # noqa: E402
from unibiomed_jax.training import flops  # noqa: E402
from unibiomed_jax.training.config import TrainConfig  # noqa: E402
from unibiomed_jax.training.experiment import load_experiment  # noqa: E402
from unibiomed_jax.training.flops import Work  # noqa: E402
from unibiomed_jax.training.initialise import structure  # noqa: E402

RECIPE = ROOT / "configs" / "unibiomed_1b.py"
# Samples of an update of the paper.
BATCH_SIZE = 128

# Known: which datasets, their tasks, and that a small one is repeated up to 5,000 samples (regions 3,000;
# volumes ten times, RadGenome twice). Assumed, since no table of theirs is at hand: that each is so small;
# RadGenome's records; and the volumes of the Medical Segmentation Decathlon and of COVID-19-CT, one target
# each. What a mixture of other proportions costs follows from the shares of its shapes, which are printed.
RADGENOME_RECORDS = 5_000
VOLUMES = {"Task06_Lung": 63, "Task09_Spleen": 41, "Task10_Colon": 126, "COVID-19_CT": 20}
# Different records of a dataset that are simulated; its samples are spread over them.
DISTINCT = 20
# Width and height of images. The paper's were prepared as BiomedParse's, all of one size; `mixed` are the
# sizes in which such images often come, each as likely: from 1 to 13 tiles.
IMAGES = {
    "prepared": ((1024, 1024),),
    "mixed": (
        *((256, 256), (512, 512), (565, 584), (640, 480), (768, 576), (775, 522)),
        *((1024, 1024), (1280, 720), (1280, 960), (2048, 1536)),
    ),
}
# Words of a finding, a report and a caption, each number as likely: an assumption, too. The words themselves
# are of VQA-RAD's questions, the names of targets of all sample data.
WORDS = {"finding": (3, 12), "report": (20, 120), "caption": (60, 220)}


@dataclass(frozen=True)
class Row:
    """What batches of a shape cost, in operations of forward and backward pass, an epoch of the mixture."""

    shape: Shape
    # What is learned from them.
    kinds: tuple[str, ...]
    samples: int
    batches: int
    # What the samples ask for, and what is computed; by part of the model.
    needed: dict[str, float]
    computed: dict[str, float]

    @property
    def padding(self) -> float:
        """Share of what is computed that no sample asks for."""
        return 1 - sum(self.needed.values()) / sum(self.computed.values())


def simulate(config: TrainConfig, tokenizer: Tokenizer, arithmetic: Arithmetic, images: str) -> list[Row]:
    """Every shape of an epoch of the mixture of a recipe, the dearest first."""
    rng = np.random.default_rng(0)
    builder = SampleBuilder(
        config.data.sample, SampleSizes.of(config.model), tokenizer, seed=config.data.seed
    )
    mixture = simulated_mixture(config, rng, images)
    shapes = record_shapes(mixture, builder, config.data.buckets)
    plan = BatchPlan(mixture, shapes, BATCH_SIZE, config.data.seed)
    records = list(mixture.records)
    sizes = np.array([sample_sizes(record, builder, rng) for record in records])
    needed = np.array([arithmetic.of(*row) for row in sizes.tolist()])

    # Positions that the output head looks at, of every batch: whole chunks up to its longest answer.
    chunk, learned = config.loss.token_chunk, sizes[:, 2]
    computed = {shape: np.zeros(len(PARTS)) for shape in plan.shapes}
    batches = dict.fromkeys(plan.shapes, 0)
    for step in range(plan.batches_per_epoch):
        rows = plan.rows(step)
        shape, longest = rows.shape, int(learned[mixture.order[rows.samples]].max())
        looked_at = -(-longest // min(chunk, shape.tokens)) * min(chunk, shape.tokens)
        slots = (shape.tiles, shape.tokens, looked_at, shape.frames, shape.objects)
        computed[shape] += BATCH_SIZE * arithmetic.of(*slots)
        batches[shape] += 1
    found = []
    for shape, members in zip(plan.shapes, plan.groups, strict=True):
        numbers = mixture.order[members]
        found.append(
            Row(
                shape,
                tuple(sorted({str(records[number].kind) for number in np.unique(numbers)})),
                len(members),
                batches[shape],
                dict(zip(PARTS, needed[numbers].sum(0), strict=True)),
                dict(zip(PARTS, computed[shape], strict=True)),
            )
        )
    return sorted(found, key=lambda row: -sum(row.computed.values()))


def total(rows: list[Row]) -> float:
    """Share of the arithmetic of all shapes that no sample asks for."""
    needed, computed = (
        sum(sum(getattr(row, part).values()) for row in rows) for part in ("needed", "computed")
    )
    return 1 - needed / computed


# Parts of the model, and the fields of flops.Work that they are.
PARTS = {
    "vision": ("vision", "projector"),
    "language model": ("decoder", "decoder_attention", "adapters"),
    "output head": ("head",),
    "SAM2": ("sam2_encoder", "mask_decoder"),
}


class Arithmetic:
    """Operations of forward and backward pass of a sample, by part of the model."""

    def __init__(self, config: TrainConfig):
        self.config = config
        trainable, _ = partition(structure(config)[1], config.freeze.trainable, config.freeze.frozen)
        nothing = Work(*(0.0 for _ in dataclasses.fields(Work)))
        # How often the arithmetic of its forward pass each part costs.
        self._times = {
            field: flops.step_flops(dataclasses.replace(nothing, **{field: 1.0}), list(trainable))
            for fields in PARTS.values()
            for field in fields
        }
        self.of = functools.cache(self._of)

    def _of(
        self, tiles: int, tokens: int, learned: int, frames: int, objects: int
    ) -> Float[np.ndarray, " parts"]:
        sizes = {
            "tile_valid": tiles,
            "token_valid": tokens,
            "labels": learned,
            "frame_valid": frames,
            "object_valid": objects,
        }
        batch = {name: np.ones((1, size), np.int32) for name, size in sizes.items()}
        work = flops.forward_work(self.config.model, batch, self.config.lora.rank)
        return np.array(
            [sum(getattr(work, field) * self._times[field] for field in fields) for fields in PARTS.values()]
        )


def sample_sizes(
    record: Record, builder: SampleBuilder, rng: np.random.Generator
) -> tuple[int, int, int, int, int]:
    """Tiles, tokens, learned tokens, frames and objects of a sample as it is drawn."""
    tiles = record.slices or builder.tiles(record.kind, record.size)
    conversation = draw(record, rng, builder.seed, builder.config.prompts)
    ids, labels = builder.encode(record, conversation, tiles)
    return (
        tiles,
        len(ids),
        int((labels != IGNORE).sum()),
        record.frames,
        len(record.masks) if record.frames else 0,
    )


def simulated_mixture(config: TrainConfig, rng: np.random.Generator, images: str) -> Mixture:
    """The recipe's datasets with records that were made up, each as often as its balancing asks."""
    targets, words = sample_words()
    parts, order, first = [], [], 0
    for dataset in config.data.datasets:
        parts.append(
            [
                simulated_record(dataset, f"{dataset.title}/{number}", rng, targets, words, IMAGES[images])
                for number in range(DISTINCT)
            ]
        )
        samples = {
            Kind.VQA: RADGENOME_RECORDS * dataset.repetitions(RADGENOME_RECORDS),
            Kind.REPORT: RADGENOME_RECORDS * dataset.repetitions(RADGENOME_RECORDS),
            Kind.SEQUENCE: VOLUMES.get(Path(dataset.root).name, 0) * dataset.repetitions(1),
        }.get(dataset.kind, DISTINCT * dataset.repetitions(DISTINCT))
        order.append(first + np.arange(samples) % DISTINCT)
        first += DISTINCT
    return Mixture(Records(parts), np.concatenate(order), (), "simulated")


def simulated_record(
    dataset: DatasetConfig,
    name: str,
    rng: np.random.Generator,
    targets: list[str],
    words: list[str],
    images: tuple[tuple[int, int], ...],
) -> Record:
    """A record with a target, or with a text of a random length, of an image of one of these sizes."""

    def said(what: str) -> str:
        least, most = WORDS[what]
        return " ".join(rng.choice(words, rng.integers(least, most + 1)))

    kind = dataset.kind
    text = {Kind.VQA: "finding", Kind.REPORT: "finding", Kind.CAPTION: "caption"}.get(kind)
    return Record(
        name,
        kind,
        images=("image.png",),
        masks=() if kind is Kind.CAPTION else (("mask.png",),),
        texts=(said(text) if text else str(rng.choice(targets)),),
        anatomy="lung" if kind is Kind.VQA else "",
        report=said("report") if kind is Kind.REPORT else "",
        size=images[rng.integers(len(images))],
        slices=dataset.slices if kind is Kind.SEQUENCE else 0,
    )


def sample_words() -> tuple[list[str], list[str]]:
    """Names of targets, and words of questions, in the sample data."""
    data, targets = ROOT / "sample_data", set()
    for table in sorted(data.glob("*/train.json")):
        for annotation in json.loads(table.read_text(encoding="utf-8"))["annotations"]:
            targets |= {sentence["raw"] for sentence in annotation["sentences"]}
    asked = json.loads((data / "vqa_rad" / "train_captions.json").read_text(encoding="utf-8"))
    words: list[str] = " ".join(one["question"] for one in asked["annotations"]).split()
    return sorted(targets), words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", choices=IMAGES, default="prepared")
    parser.add_argument("--tiles", help="other buckets than the recipe's: 1,5,10,13")
    parser.add_argument("--text", help="other buckets than the recipe's: 128,512")
    options = parser.parse_args()
    config = load_experiment(str(RECIPE))
    given = {"tiles": options.tiles, "text": options.text}
    chosen = {name: tuple(map(int, sizes.split(","))) for name, sizes in given.items() if sizes}
    buckets = dataclasses.replace(config.data.buckets, **chosen)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=buckets))
    show(simulate(config, qwen2_tokenizer(), Arithmetic(config), options.images), buckets)


def show(rows: list[Row], buckets: BucketConfig) -> None:
    """Print the table."""
    everything = sum(sum(row.computed.values()) for row in rows)
    print(f"buckets: tiles {buckets.tiles}, text {buckets.text}, objects {buckets.objects}")
    print("frames objects tiles tokens  samples  batches  share of all  padding  learned from them")
    for row in rows:
        shape, computed = row.shape, sum(row.computed.values())
        print(
            f"{shape.frames:6d} {shape.objects:7d} {shape.tiles:5d} {shape.tokens:6d} {row.samples:8,d} "
            f"{row.batches:8,d} {computed / everything:13.1%} {row.padding:8.1%}  {', '.join(row.kinds)}"
        )
    print("part of the model   share of all  padding, as a share of all")
    for part in PARTS:
        needed, computed = (sum(getattr(row, sums)[part] for row in rows) for sums in ("needed", "computed"))
        print(f"{part:18s} {computed / everything:13.1%} {(computed - needed) / everything:8.1%}")
    print(f"{len(rows)} shapes; padding is {total(rows):.1%} of the arithmetic")


if __name__ == "__main__":
    main()
