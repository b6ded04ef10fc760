"""A copy of a split in which every image is also asked about something that is not in it.

    python scripts/absent_targets.py absent --split test
    unibiomed eval --checkpoint checkpoints/unibiomed-tiny --data absent --task seg2d --out runs/absent

The target comes from another dataset, with none of the words for site and modality ("abdomen CT") that the
image's own targets have; its mask is empty. What a model draws for it is wrong, and its object score should
be low.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from unibiomed_jax.commands.run import main as run
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import read_json
from unibiomed_jax.inputs.images import open_image


@dataclass(frozen=True)
class Args:
    """Write a dataset with absent targets."""

    # Where it goes.
    out: Annotated[Path, tyro.conf.Positional]
    # Folder of datasets of 2-D segmentation.
    data: Path = Path(__file__).parent.parent / "sample_data"
    # Which part of them.
    split: str = "test"
    # Only the datasets of these names; by default all.
    datasets: tuple[str, ...] = ()


def place(sentence: str) -> set[str]:
    """The words for site and modality in `target in site modality`."""
    return set(sentence.lower().rstrip(".").rpartition(" in ")[2].split())


def main(args: Args) -> None:
    tables = {
        path.parent.name: read_json(path)
        for path in sorted(args.data.glob(f"*/{args.split}.json"))
        if (path.parent / args.split).is_dir() and (not args.datasets or path.parent.name in args.datasets)
    }
    sentences = {
        name: sorted({one["sentences"][0]["sent"] for one in table["annotations"]})
        for name, table in tables.items()
    }
    for name, table in tables.items():
        own = set().union(*map(place, sentences[name]))
        others = [text for found in sentences.values() for text in found if not place(text) & own]
        if not others:
            raise InputError(f"No other dataset of {args.data} is unlike {name}; leave it out of --datasets.")
        folder = args.out / name
        for part in (args.split, f"{args.split}_mask"):
            shutil.copytree(args.data / name / part, folder / part)
        draw = random.Random(name)
        for image in table["images"]:
            sentence = draw.choice(others)
            file = f"{Path(image['file_name']).stem}_absent.png"
            size = open_image(folder / args.split / image["file_name"])[0].size
            Image.new("L", size).save(folder / f"{args.split}_mask" / file)
            table["annotations"].append(
                {
                    "id": len(table["annotations"]),
                    "image_id": image["id"],
                    "file_name": image["file_name"],
                    "mask_file": file,
                    "sentences": [{"raw": sentence, "sent": sentence}],
                }
            )
        (folder / f"{args.split}.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    run(Args, main)
