"""A volume: the language model sees a few slices, and the target is followed through all the others.

    python examples/volume.py

Writes volume_answer/: answer.json, a PNG per slice for the mask, and an overlay per slice.
"""

from pathlib import Path

from unibiomed_jax import UniBiomed
from unibiomed_jax.outputs import answer_folder

ROOT = Path(__file__).parents[1]


def main() -> None:
    model = UniBiomed.from_pretrained(ROOT / "checkpoints" / "unibiomed-tiny")
    slices = sorted((ROOT / "sample_data/sarcoma_ct/STS_008_ct").glob("*.png"))
    # Slices that show the target; by default the first few, which may miss it.
    volume = model.open_volume(slices, conditioning=[3, 6, 9])
    answer = model.predict(volume, "<image>Please segment soft tissue sarcoma in body CT.")

    print(answer.text)
    for segment in answer.segments:
        print(f"{segment.phrase}, a mask of {segment.mask.shape} (slices, rows, columns)")
        for number, mask in enumerate(segment.mask):
            how = "shown" if number in volume.conditioning else "followed"
            print(f"    slice {number:2} ({how}): {mask.sum()} pixels")
    record = answer_folder.record(answer, checkpoint_hash=model.checkpoint_hash, precision=model.precision)
    answer_folder.write(Path("volume_answer"), volume, answer, record)
    print(answer.notice)


if __name__ == "__main__":
    main()
