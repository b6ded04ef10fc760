"""Ask unibiomed-tiny about real images it was not trained on: seven images and one CT scan.

    python examples/demo.py [--out demo_output]

Every image leaves a folder with the answer, the masks and an overlay; the scan one with a page to look at it
in a browser and the mask as NIfTI. The Dice beside an answer compares its mask with the dataset's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from unibiomed_jax import Answer, Request, StudyAnswer, UniBiomed, open_study, write_study
from unibiomed_jax.commands.run import main as run
from unibiomed_jax.inference.phrases import clean_answer
from unibiomed_jax.masks.measures import dice_score
from unibiomed_jax.outputs import answer_folder

REPOSITORY = Path(__file__).parent.parent
CHECKPOINT = REPOSITORY / "checkpoints" / "unibiomed-tiny"
DATA = REPOSITORY / "sample_data"


class Example(NamedTuple):
    """An image or a scan of the test split, and what to ask about it."""

    image: str
    question: str
    # Its mask in the dataset.
    truth: str

    @property
    def name(self) -> str:
        return Path(self.image).name.partition(".")[0]


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
SCAN = Example(
    "sarcoma_ct/STS_025_ct.nii.gz",
    "Please segment soft tissue sarcoma in body CT.",
    "sarcoma_ct/STS_025_ct_mask.nii.gz",
)


@dataclass(frozen=True)
class Args:
    """Ask unibiomed-tiny about real images it was not trained on: seven images and one CT scan."""

    # Folder for the answers, the masks and the overlays.
    out: Path = Path("demo_output")


def read_mask(path: Path) -> np.ndarray:
    """The dataset's own mask: of a picture, or of a scan on the grid of `Study.values`."""
    if path.suffix == ".gz":
        return open_study(path, modality="OT").values > 0
    with Image.open(path) as image:
        return np.asarray(image) > 0


def dice(mask: np.ndarray, example: Example) -> str:
    """Overlap of a mask with the dataset's, for the eye; the slices of a scan count as one tall image."""
    found, expected = (each.reshape(-1, each.shape[-1]) for each in (mask, read_mask(DATA / example.truth)))
    return f"Dice {dice_score(found, expected):.2f}"


def main(args: Args) -> None:
    console = Console(highlight=False)

    with console.status("Loading the model; the first run compiles it, which takes half a minute"):
        model = UniBiomed.from_pretrained(CHECKPOINT)
        requests = [
            Request(f"<image>\n{example.question}", model.open(DATA / example.image)) for example in IMAGES
        ]
        answers = model.predict_batch(requests, max_new_tokens=64)
    for example, request, answer in zip(IMAGES, requests, answers, strict=True):
        record = answer_folder.record(
            answer, checkpoint_hash=model.checkpoint_hash, precision=model.precision
        )
        answer_folder.write(args.out / example.name, request.image, answer, record)
        show(console, example, answer)

    study = open_study(DATA / SCAN.image, modality="CT")
    with console.status("") as status:
        answer = model.ask_study(
            study,
            SCAN.question,
            max_new_tokens=64,
            progress=lambda stage, done, total: status.update(f"A CT scan, {stage}: slice {done} of {total}"),
        )
    write_study(study, answer, args.out / SCAN.name, ("html", "nifti"), overwrite=True)
    show(console, SCAN, answer)
    console.print(f"Written to {args.out}: for each image answer.json, a PNG per mask, overlay.png;")
    console.print(f"for the scan a page to look at it: {args.out / SCAN.name / 'study.html'}")
    console.print(
        "[bold]unibiomed-tiny is a small teaching model:[/bold] docs/unibiomed_tiny.md says what it was "
        "trained on, what was measured and what it cannot do."
    )
    console.print(answer.notice, style="italic")


def show(console: Console, example: Example, answer: Answer | StudyAnswer) -> None:
    """A question, what was answered, and how well the first mask fits."""
    fit = dice(answer.segments[0].mask, example) if answer.segments else "no mask"
    console.print(f"[bold]{example.name}[/bold]  {example.question}")
    console.print(f"    {clean_answer(answer.text)}  ({fit})", markup=False)


if __name__ == "__main__":
    run(Args, main)
