"""One question about one image: words, a mask for every thing the answer names, and a picture of them.

    python examples/ask.py

Writes mask_0.png, mask_1.png, ... and overlay.png to the current folder.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from unibiomed_jax import UniBiomed
from unibiomed_jax.masks.overlay import overlay

ROOT = Path(__file__).parents[1]


def main() -> None:
    model = UniBiomed.from_pretrained(ROOT / "checkpoints" / "unibiomed-tiny")
    image = model.open(ROOT / "sample_data/hc18_fetal_head/test/1044.jpg")
    # `<image>` says where the image goes; training put a newline after it.
    answer = model.predict(image, "<image>\nCan you segment the fetal head in fetal ultrasound?")

    print(answer.text)  # as it was generated: [SEG] asks for a mask, <|end|> is the last thing said
    for number, segment in enumerate(answer.segments):
        print(f"mask {number}: {segment.phrase}, {segment.mask.mean():.0%} of the image")
        Image.fromarray(segment.mask.astype(np.uint8) * 255).save(f"mask_{number}.png")
    masks = [segment.mask for segment in answer.segments]
    overlay(image.frames[0], masks, [segment.phrase for segment in answer.segments]).save("overlay.png")
    print(answer.notice)


if __name__ == "__main__":
    main()
