"""Several images in one call, two ways.

    python examples/batch.py

`predict_batch` works stage by stage and does no more than the answers need. `ground` gives the same answers
from one compiled function, pixels to masks, which is what is divided over devices or exported.
"""

from pathlib import Path

import numpy as np

from unibiomed_jax import Request, UniBiomed
from unibiomed_jax.inference.phrases import clean_answer

DATA = Path(__file__).parents[1] / "sample_data"
CHECKPOINT = DATA.parent / "checkpoints" / "unibiomed-tiny"
QUESTIONS = {
    "hc18_fetal_head/test/1044.jpg": "<image>\nCan you segment the fetal head in fetal ultrasound?",
    "idrid_fundus/test/IDRiD_05.jpg": "<image>\nPlease segment optic disc in retinal fundus.",
    "cxr_montgomery/test/montgomery_2.jpg": "<image>\nPlease segment lungs in chest X-ray.",
}


def main() -> None:
    model = UniBiomed.from_pretrained(CHECKPOINT)
    requests = [Request(question, model.open(DATA / image)) for image, question in QUESTIONS.items()]
    staged = model.predict_batch(requests, max_new_tokens=32)
    at_once = model.ground(requests, max_new_tokens=32, objects=1)
    for image, one, other in zip(QUESTIONS, staged, at_once, strict=True):
        (mask,), (again,) = ([segment.mask for segment in answer.segments] for answer in (one, other))
        print(f"{image}: {clean_answer(one.text)}, {mask.mean():.0%} of the image")
        print(
            f"    by one call: {clean_answer(other.text)}, {np.mean(mask == again):.2%} of the pixels alike"
        )
    print(staged[0].notice)


if __name__ == "__main__":
    main()
