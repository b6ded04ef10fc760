"""What is this? The same question about two regions of one image, each given as a mask and as a box.

    python examples/region.py

Training shows a region by a green box drawn into the image. The marks used here are those of the reference's
predictor, which unibiomed-tiny has never seen: on this image it names the lungs, on others it does not.
"""

from pathlib import Path

from unibiomed_jax import UniBiomed
from unibiomed_jax.inference.phrases import clean_answer
from unibiomed_jax.inputs.masks import open_mask

ROOT = Path(__file__).parents[1]
LUNGS = ROOT / "sample_data" / "cxr_montgomery"
# Left and right of the patient, as always in radiology. Boxes are (x0, y0, x1, y1) in pixels.
REGIONS = {
    "montgomery_2_left+lung.png": (147, 29, 228, 251),
    "montgomery_2_right+lung.png": (27, 32, 113, 244),
}
QUESTION = "<image>\nWhat is the <region> in the picture?"


def main() -> None:
    model = UniBiomed.from_pretrained(ROOT / "checkpoints" / "unibiomed-tiny")
    image = model.open(LUNGS / "test" / "montgomery_2.jpg")  # encoded once for all four questions
    for file, box in REGIONS.items():
        mask = open_mask(LUNGS / "test_mask" / file)
        by_mask = model.predict(image, QUESTION, regions=[mask])
        by_box = model.predict(image, QUESTION, boxes=[box])
        print(f"{file}: {clean_answer(by_mask.text)}")
        print(f"{box}: {clean_answer(by_box.text)}")
    print(by_box.notice)


if __name__ == "__main__":
    main()
