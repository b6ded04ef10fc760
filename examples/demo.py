"""Ask unibiomed-tiny about real images it was not trained on: seven images and one CT volume.

    python examples/demo.py [--out demo_output]

Every image leaves a folder with the answer, the masks and an overlay. The Dice beside an answer compares its
mask with the dataset's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from unibiomed_jax import Answer, Request, UniBiomed
from unibiomed_jax.commands.run import main as run
from unibiomed_jax.inference.phrases import clean_answer
from unibiomed_jax.masks.measures import dice_score
from unibiomed_jax.outputs import answer_folder

REPOSITORY = Path(__file__).parent.parent
CHECKPOINT = REPOSITORY / "checkpoints" / "unibiomed-tiny"
DATA = REPOSITORY / "sample_data"


class Example(NamedTuple):
    """An image of the test split, and what to ask about it; for a volume, patterns of its slices."""

    image: str
    question: str
    # Its mask in the dataset.
    truth: str

    @property
    def name(self) -> str:
        path = Path(self.image)
        return path.parent.name if "*" in path.name else path.stem


IMAGES = (
    Example(
        "hc18_fetal_head/test/1044.jpg",
        "Can you segment the fetal head in fetal ultrasound?",
        "hc18_fetal_head/test_mask/1044_fetal+head.png",
    ),
    Example(
        "isic2017/test/ISIC_0013416.jpg",
        "Can we see abnormality? Please highlight the region with interleaved segmentation masks.",
        "isic2017/test_mask/ISIC_0013416_skin+lesion.png",
    ),
    Example(
        "idrid_fundus/test/IDRiD_05.jpg",
        "Please segment optic disc in retinal fundus.",
        "idrid_fundus/test_mask/IDRiD_05_optic+disc.png",
    ),
    Example(
        "octa_faz/test/deep_238.jpg",
        "Where is the foveal avascular zone in retinal OCT? Please respond with a segmentation mask.",
        "octa_faz/test_mask/deep_238_foveal+avascular+zone.png",
    ),
    Example(
        "cxr_montgomery/test/montgomery_2.jpg",
        "Please segment lungs in chest X-ray.",
        "cxr_montgomery/test_mask/montgomery_2_lungs.png",
    ),
    Example(
        "spider_spine_t2_mri/test/1056_16.jpg",
        "Please segment vertebrae in lumbar spine MRI.",
        "spider_spine_t2_mri/test_mask/1056_16_vertebrae.png",
    ),
    Example(
        "msd_spleen_ct/test/10024_spleen_59.jpg",
        "Please segment spleen in abdomen CT.",
        "msd_spleen_ct/test_mask/10024_spleen_59_spleen.png",
    ),
)
VOLUME = Example(
    "sarcoma_ct/STS_008_ct/*.png",
    "Please segment soft tissue sarcoma in body CT.",
    "sarcoma_ct/mask/STS_008_ct/*.png",
)


@dataclass(frozen=True)
class Args:
    """Ask unibiomed-tiny about real images it was not trained on: seven images and one CT volume."""

    # Folder for the answers, the masks and the overlays.
    out: Path = Path("demo_output")


def dice(answer: Answer, example: Example) -> str:
    """Overlap of the first mask with the dataset's, for the eye."""
    if not answer.segments:
        return "no mask"
    expected = []
    for path in sorted(DATA.glob(example.truth)):
        with Image.open(path) as image:
            expected.append(np.asarray(image) > 0)
    # The slices of a volume count as one tall image.
    found, expected = (
        mask.reshape(-1, mask.shape[-1]) for mask in (answer.segments[0].mask, np.stack(expected))
    )
    return f"Dice {dice_score(found, expected):.2f}"


def main(args: Args) -> None:
    console = Console(highlight=False)

    with console.status("Loading the model; the first run compiles it, which takes half a minute"):
        model = UniBiomed.from_pretrained(CHECKPOINT)
        requests = [
            Request(f"<image>\n{example.question}", model.open(DATA / example.image)) for example in IMAGES
        ]
        answers = model.predict_batch(requests, max_new_tokens=64)
    slices = sorted(DATA.glob(VOLUME.image))
    with console.status(f"A CT volume of {len(slices)} slices"):
        # The slices in which the language model looks for the target; from there it is followed.
        shown = np.linspace(0, len(slices) - 1, model.config.sam2.max_conditioning_frames + 2)[1:-1]
        volume = model.open_volume(slices, conditioning=shown.round().astype(int).tolist())
        requests.append(Request(f"<image>{VOLUME.question}", volume))
        answers += model.predict_batch(requests[-1:], max_new_tokens=64)

    for example, request, answer in zip((*IMAGES, VOLUME), requests, answers, strict=True):
        record = answer_folder.record(
            answer, checkpoint_hash=model.checkpoint_hash, precision=model.precision
        )
        answer_folder.write(args.out / example.name, request.image, answer, record)
        console.print(f"[bold]{example.name}[/bold]  {example.question}")
        console.print(f"    {clean_answer(answer.text)}  ({dice(answer, example)})", markup=False)
    console.print(f"Written to {args.out}: for each of them answer.json, a PNG per mask, overlay.png")
    console.print(
        "[bold]unibiomed-tiny is a small teaching model:[/bold] docs/unibiomed_tiny.md says what it was "
        "trained on, what was measured and what it cannot do."
    )
    console.print(answers[0].notice, style="italic")


if __name__ == "__main__":
    run(Args, main)
