"""Ask a micro UniBiomed with random weights about a real CT slice: shows the way, not the medicine.

    python examples/demo.py [--out demo_output]

Random weights never say [SEG], so the demo puts it into the model's mouth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from unibiomed_jax import Request, UniBiomed
from unibiomed_jax.inference import report

REPOSITORY = Path(__file__).parent.parent
CHECKPOINT = REPOSITORY / "tests" / "golden" / "micro" / "checkpoint"
IMAGE = REPOSITORY / "tests" / "golden" / "images" / "CT_abdomen.png"
QUESTION = "<image>Please segment the liver and the spleen."
FORCED_ANSWER = "<p> the liver </p> [SEG] and <p> the spleen </p> [SEG].<|end|>"


@dataclass(frozen=True)
class Args:
    """Run the demo."""

    # Folder for the answer, the masks and the overlay.
    out: Path = Path("demo_output")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    console = Console()
    with console.status("Loading the model; the first run compiles it, which takes a minute"):
        model = UniBiomed.from_pretrained(CHECKPOINT)
        forced = dict(enumerate(model.tokenizer.encode(FORCED_ANSWER)))
        request = Request(QUESTION, model.open(IMAGE), forced=forced)
        answer = model.predict_batch([request], max_new_tokens=len(forced))[0]
    folder = args.out / IMAGE.name
    description = report.describe(
        answer, checkpoint_hash=model.checkpoint_hash, precision=model.config.precision
    )
    report.write(folder, request.image, answer, description)
    console.print(f"Question  {answer.prompt}", highlight=False, markup=False)
    console.print(f"Answer    {answer.text}", highlight=False, markup=False)
    for segment in answer.segments:
        console.print(
            f"          {segment.phrase}: {segment.mask.mean():.0%} of the image, "
            f"predicted IoU {segment.iou:.2f}, object score {segment.object_score:.2f}"
        )
    console.print(f"Written to {folder}: answer.json, a PNG for every mask, overlay.png")
    console.print("[bold]Random weights, a dictated answer: its words and its masks mean nothing.[/bold]")
    console.print(answer.notice, style="italic")


if __name__ == "__main__":
    main()
