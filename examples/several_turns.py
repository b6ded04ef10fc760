"""Several questions about one image, each answer known to the next: `history`.

    python examples/several_turns.py

The image is encoded at the first question and never again, which the seconds of every stage show.
"""

from pathlib import Path

from unibiomed_jax import UniBiomed

ROOT = Path(__file__).parents[1]
# Only the first question says where the image goes.
QUESTIONS = (
    "<image>\nPlease segment left lung in chest X-ray.",
    "Please segment right lung in chest X-ray.",
)


def main() -> None:
    model = UniBiomed.from_pretrained(ROOT / "checkpoints" / "unibiomed-tiny")
    image = model.open(ROOT / "sample_data/cxr_montgomery/test/montgomery_2.jpg")
    answer = None
    for question in QUESTIONS:
        answer = model.predict(image, question, history=answer)
        (segment,) = answer.segments
        columns = segment.mask.any(0).nonzero()[0]
        print(f"{question.strip()!r}: {answer.text!r}")
        print(f"    {segment.phrase}: columns {columns[0]} to {columns[-1]} of {image.size[0]}")
        print("    " + ", ".join(f"{stage} {value:.2f} s" for stage, value in answer.seconds.items()))
    print(f"The conversation so far:\n{answer.transcript}")
    print(answer.notice)


if __name__ == "__main__":
    main()
