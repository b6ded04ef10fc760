"""What can be said to `unibiomed eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unibiomed_jax.config.fields import Address
from unibiomed_jax.config.precision import PrecisionName
from unibiomed_jax.distributed import Processes

Format = Literal[
    "unibiomed", "reference", "biomedparse", "mecovqa", "slake", "vqa-rad", "parquet", "omnimedvqa", "table"
]
Rule = Literal["medplib", "llava-med", "medevalkit", "lmms-eval"]
TaskName = Literal["seg2d", "seg3d", "disease", "region", "gvqa", "report", "caption", "vqa", "all"]


@dataclasses.dataclass(frozen=True)
class EvalOptions(Processes):
    """Ask a model the records of a dataset and score its answers; or score those of a run, or predictions in
    the folders of UniBiomed's scripts.
    """

    # Folder of the run: answers go to samples_TASK.jsonl, numbers to results.json and results.csv.
    out: Address
    # A converted or a released folder, or a repository on Hugging Face; without one, what the run has is
    # scored.
    checkpoint: Annotated[str | Path | None, tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")] = None
    # One act alone: "infer" answers, "score" scores the answers that are there.
    mode: Literal["infer", "score"] | None = None
    # Tasks; by default all that the data, or the run, has.
    task: tuple[TaskName, ...] = ()
    # "paper": the numbers that UniBiomed's scripts compute; "strict": definitions of the field, in
    # millimetres, with intervals.
    protocol: Literal["paper", "strict", "both"] = "strict"
    # Folder of predictions as UniBiomed's scripts write them, of a single --task; its records go to --out.
    predictions: Address | None = None
    # Folder of the dataset that is asked, or that predictions are about.
    data: Address | None = None
    # How it is laid out; `unibiomed eval --list` says what is known.
    format: Format = "unibiomed"
    # Part of it.
    split: str = "test"
    # Ask only the datasets of these names.
    datasets: tuple[str, ...] = ()
    # Under "paper": do sensibly, and note, what the reference fails at.
    repair: bool = False
    # Write the run's predictions there too, in the folders of UniBiomed's scripts.
    folders: Address | None = None
    # Under "strict": a JSON file of tolerances of the surface Dice by target, mm.
    tolerances: Path | None = None
    # Under "strict": when an answer to a closed or open question is right, as these publish numbers.
    rule: tuple[Rule, ...] = ("medplib", "lmms-eval")
    # Slices of a volume that are answered from: "first", as by UniBiomed's scripts, or "target", spread over
    # those that show the true target, which needs to know them.
    conditioning: Literal["first", "target"] = "target"
    # Images asked about in one go; takes the memory of the next power of two, four times.
    batch_size: int = 8
    # Longest answer, tokens.
    max_new_tokens: int = 2048
    # "auto": bfloat16, as the reference; float32 on a CPU. "fast": coarser, where a CPU multiplies bfloat16.
    precision: PrecisionName = "auto"
    # Divide the model over all devices of a process: a strategy of unibiomed_jax/sharding/strategies.py.
    strategy: str | None = None
    # With a strategy: devices along the axes of the mesh, such as fsdp=4,tensor=2.
    mesh: str | None = None


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """By how much a second run is better than a first, with intervals over the patients of both."""

    first: Annotated[Address, tyro.conf.Positional]
    second: Annotated[Address, tyro.conf.Positional]
    # Write the table there, as CSV.
    csv: Address | None = None
    # Write a page about it there, such as compare.html.
    page: Address | None = None
    # Every target, not the means over them alone.
    targets: bool = False


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """What can be evaluated, with its licence and where to get it; `unibiomed eval --list` is the same."""


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Ask a model all of UniBiomed's test sets that are there; set its numbers beside the published ones."""

    # The released checkpoint, as for `unibiomed eval`.
    checkpoint: Annotated[str | Path, tyro.conf.arg(metavar="OWNER/NAME[@REVISION]|PATH")]
    # The folder Biomed of the reference's layout.
    data: Path
    # Answers go there, published_numbers.md and published_numbers.csv; a second call goes on with the first.
    out: Path = Path("reproduced")
    # Tasks; by default all that the data has.
    task: tuple[Literal["seg2d", "disease", "region", "gvqa", "report", "caption"], ...] = ()
    # Images asked about in one go.
    batch_size: int = 8
    # As for `unibiomed eval`.
    precision: PrecisionName = "auto"
