"""docs/plans.md: what was planned for the chips that people rent, from programs that were compiled before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from unibiomed_jax.planning.cases import answer_case, train_case
from unibiomed_jax.planning.facts import Facts, look
from unibiomed_jax.planning.programs import AnswerCase, TrainCase
from unibiomed_jax.planning.report import GIB, fits
from unibiomed_jax.planning.roofline import estimate
from unibiomed_jax.planning.topologies import CHIPS

# A sample of one tile, a row of 1,280 tokens, four masks; 13 tiles and 3,840 tokens are the longest.
USUAL = {"tiles": 1, "tokens": 1280, "objects": 4}
LONGEST = {"tiles": 13, "tokens": 3840, "objects": 4}
QUESTION = {"tiles": 5, "tokens": 1536, "new_tokens": 256, "objects": 4, "frames": 1}
# Chips and what divides the model over them: the strategies that configs/unibiomed_1b.py advises.
PLACES = (
    ("v5e:2x4", "data_parallel"),
    ("v5e:16x16", "sequence"),
    ("v5p:4x4x4", "fsdp"),
    ("v5p:4x8x8", "sequence"),
    ("v6e:16x16", "sequence"),
    ("v5e:16x16@2", "hsdp"),
    ("h100:8", "data_parallel"),
)
WIDER = ("3b", "7b", "14b")
WIDER_PLACES = ("v5p:4x4x4", "h100:8")
STAGES = ("encode_tiles", "prefill", "advance", "encode_image")


def training() -> Iterator[TrainCase]:
    """Updates that the page is about."""
    for place, strategy in PLACES:
        for mode in ("lora", "full"):
            wide = "fsdp" if mode == "full" and strategy == "data_parallel" else strategy
            yield train_case(place, "1b", mode, wide, None, per_share=1, **USUAL)
    yield train_case("v5e:2x4", "1b", "full", "fsdp", None, per_share=1, **LONGEST)
    yield train_case("v5e:2x4", "1b", "lora", "data_parallel", None, per_share=4, **LONGEST)
    for place in WIDER_PLACES:
        for model in WIDER:
            for mode in ("lora", "full"):
                yield train_case(place, model, mode, "fsdp", None, per_share=1, **USUAL)


def answers() -> Iterator[AnswerCase]:
    """Answers that the page is about."""
    for batch in (1, 8, 32):
        for stage in STAGES:
            yield answer_case("v5e:1x1", "1b", stage, "data_parallel", None, batch=batch, **QUESTION)
    for place, batch in (("v5e:1x1", 8), ("v5e:4x4", 64), ("h100:1", 8)):
        yield answer_case(place, "1b", "ground", "data_parallel", None, batch=batch, **QUESTION)


HEADER = """# Plans: what programs ask of chips

Written by `unibiomed plan --page docs/plans.md`; nothing here was measured on such a chip. Memory,
collectives and whether a program fits a TPU are **facts** of the compiler for that chip, of a program that
was compiled with none at hand (whether it fits a GPU is an estimate: JAX takes three quarters of the card, if
nobody asks for more). Times are **estimates**: the largest of what arithmetic, memory and links need
by themselves at the peaks of data sheets ([constants](#constants)), perfectly overlapped. Expect a real
step to be slower, and use the order, not the digits. `unibiomed plan --topology v5e:4x4 --strategy fsdp`
makes such a plan for other sizes, and `python train.py CONFIG --dry-run --topology v5p:4x4x4` that of your
own run.

An "update" row is the program that a batch goes through: bfloat16, samples of one image with four masks,
spread evenly over the shares of the batch. Days and chip-hours are those of the paper's 100,000 updates of
128 samples. LoRA is the published recipe; full trains everything that a loss reaches and computes every
block again on the way back.

A row is filled by compiling it, `unibiomed plan --topology v5p:4x4x4 --mode full --strategy fsdp --kept
FOLDER`, and writing the page again, `unibiomed plan --page docs/plans.md --kept FOLDER`.
"""


def page(folder: Path) -> str:
    """The page, from what lies in a folder; what was not compiled is listed as such."""
    parts, missing, made = [HEADER], [], set()

    def rows(cases: Iterator, row: Callable) -> Iterator[str]:
        for case in cases:
            facts = look(case, folder, of_any_code=True)
            if facts is None:
                missing.append(_named(case))
            else:
                made.add(", ".join(f"{name} {version}" for name, version in facts.made_by.items()))
                yield row(case, facts)

    parts += [
        "## Training\n",
        "GiB are of one device; collectives are MiB of one, loops counted as often as they run.\n",
        "| model | sample | chips | strategy | samples | held | temporary | peak | fits | collectives "
        "| TFLOP | bound by | at best | MFU | days | chip-hours | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows(training(), _training_row),
        "\n## Answers\n",
        "Questions of 1,536 tokens about an image of five tiles, answers of 256 tokens with up to four "
        "masks. `advance` is the loop over tokens, all 256 of them; `ground` is the whole answer as one "
        "program. `reads` is what a token reads of the memory over the parameters of the language model and "
        "the cache, which it cannot but read.\n",
        "| program | chips | at a time | peak | fits | bound by | at best | images/s | tokens/s | reads "
        "| compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows(answers(), _answer_row),
    ]
    if missing:
        parts += ["\n## Not compiled yet\n", *(f"- {name}" for name in missing)]
    parts += [
        "\n## Constants\n",
        "Of a device, which is half a chip of tpu7x. Links: both ways along one ring of neighbours; network: "
        "to devices of other slices or nodes.\n",
        "| chip | memory | bandwidth | bfloat16 | float32 | links | network | from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, chip in CHIPS.items():
        parts.append(
            f"| {name} | {chip.memory / GIB:.0f} GiB | {chip.bandwidth / 1e9:,.0f} GB/s | "
            f"{chip.peak / 1e12:,.1f} TFLOP/s | 1/{chip.float32_cost:g} of it | "
            f"{chip.link / 1e9:,.0f} GB/s | {chip.network / 1e9:g} GB/s | {'; '.join(chip.sources)} |"
        )
    parts.append("\nMade by: " + "; ".join(sorted(made)) + "." if made else "")
    return "\n".join(parts) + "\n"


def _named(case: TrainCase | AnswerCase) -> str:
    if isinstance(case, TrainCase):
        return (
            f"{case.title}, update, {case.topology}, {case.config.strategy}, {_sample(case)}, "
            f"{case.config.data.batch_size:,} samples"
        )
    return f"{case.title}, {case.topology}, {case.batch} at a time"


def _sample(case: TrainCase) -> str:
    tiles = case.shape.tiles
    return f"{tiles} {'tile' if tiles == 1 else 'tiles'}, {case.shape.tokens:,} tokens"


def _training_row(case: TrainCase, facts: Facts) -> str:
    compiled = facts.compiled
    held = sum(size for part, size in facts.held.items())
    mesh = ",".join(f"{axis}={size}" for axis, size in facts.mesh.items() if size > 1)
    start = [
        facts.title,
        _sample(case),
        facts.topology,
        f"{facts.strategy} {mesh}",
        f"{facts.samples:,}",
        f"{held / GIB:.2f}",
    ]
    enough, left = fits(facts)
    operations = sum(facts.operations.values()) / 1e12
    seconds = f"{compiled.seconds / 60:.1f} CPU min"
    if compiled.refused is not None:
        asked, there = compiled.refused
        says = f"no: {asked / GIB:.1f} of {there / GIB:.1f}"
        return _row(*start, "", "", says, "", f"{operations:,.1f}", *[""] * 5, seconds)
    times = estimate(facts)
    kinds: dict[str, float] = {}
    for one in compiled.collectives:
        kinds[one.kind] = kinds.get(one.kind, 0) + one.bytes / 2**20
    moved = ", ".join(f"{kind} {size:,.0f}" for kind, size in kinds.items() if size >= 1)
    return _row(
        *start,
        f"{compiled.temporaries / GIB:.2f}",
        f"{(compiled.peak + facts.idle) / GIB:.2f}",
        f"yes, {left / GIB:.1f} free" if enough else f"no, {-left / GIB:.1f} too much",
        moved or "none",
        f"{operations:,.1f}",
        times.bound,
        f"{times.seconds * 1e3:,.0f} ms",
        f"{times.mfu:.0%}" if times.mfu is not None else "",
        f"{times.days:.1f}" if times.days is not None else "",
        f"{times.chip_hours:,.0f}" if times.chip_hours is not None else "",
        seconds,
    )


def _answer_row(_: AnswerCase, facts: Facts) -> str:
    compiled = facts.compiled
    start = [facts.program, facts.topology, f"{facts.samples:,}"]
    seconds = f"{compiled.seconds / 60:.1f} CPU min"
    enough, left = fits(facts)
    if compiled.refused is not None:
        asked, there = compiled.refused
        return _row(*start, "", f"no: {asked / GIB:.1f} of {there / GIB:.1f}", *[""] * 5, seconds)
    times = estimate(facts)
    return _row(
        *start,
        f"{(compiled.peak + facts.idle) / GIB:.2f}",
        f"yes, {left / GIB:.1f} free" if enough else f"no, {-left / GIB:.1f} too much",
        times.bound,
        f"{times.seconds * 1e3:,.1f} ms",
        f"{times.samples_per_second:,.1f}",
        f"{times.tokens_per_second:,.0f}" if facts.said else "",
        f"{times.reads_per_token:.2f}" if times.reads_per_token is not None else "",
        seconds,
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
