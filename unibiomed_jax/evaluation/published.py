"""The numbers that the paper's scripts make of the released checkpoint, and those that come out here.

`published.csv` has a row for each: task, dataset, score, the number, and where it was read. A number that
nobody read there stays empty, and nothing is filled in that was not run.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from unibiomed_jax.data.prompts import (
    CAPTION_QUESTIONS,
    DISEASE_QUESTIONS,
    REGION_QUESTIONS,
    REPORT_QUESTIONS,
    VQA_QUESTIONS,
)
from unibiomed_jax.evaluation import paper, scoring
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.evaluation.repairs import Repairs

COMMAND = "unibiomed eval reproduce --checkpoint RELEASED --data ROOT"

_ALONE = """unibiomed eval --checkpoint RELEASED --data ROOT --format reference --protocol paper --repair \\
    --out RUN"""


class PublishedNumber(NamedTuple):
    task: str
    # Its folder below data/Biomed.
    dataset: str
    score: str
    # As printed; empty where it was not found.
    value: str
    source: str


@dataclass(frozen=True)
class Reproduced:
    """What came out for one dataset of a task."""

    metrics: Mapping[str, float | None]
    # Of what; another of the images' mDice.
    n: int
    # What was not scored, and why.
    unscored: Mapping[str, str]
    notes: Sequence[str]


# By task: what is asked, for the page.
_PROMPTS = {
    "seg2d": "`<image>Please segment TARGET.`, the target as `sent` spells it. Only the first 300 masks of a "
    "table count.",
    "disease": f'`<image>` and one of {len(DISEASE_QUESTIONS)} questions, such as "{DISEASE_QUESTIONS[0]}" '
    "The scripts draw it without a seed; here the record's name draws it.",
    "region": f"`<image>`, a newline and one of {len(REGION_QUESTIONS)} questions, such as "
    f'"{REGION_QUESTIONS[0]}", drawn as above; a green box lies around the mask. The scripts take another '
    "checkpoint for it (`save_hf_region`) than for all else.",
    "gvqa": f'`<image>` and one of {len(VQA_QUESTIONS)} questions, such as "{VQA_QUESTIONS[0]}", drawn as '
    "above.",
    "report": f"`<image>`, a newline and one of {len(REPORT_QUESTIONS)} requests, such as "
    f'"{REPORT_QUESTIONS[0]}", drawn as above. The published script puts `<image>` in twice, which cannot '
    "run.",
    "caption": f"`<image>`, a newline and one of {len(CAPTION_QUESTIONS)} requests, such as "
    f'"{CAPTION_QUESTIONS[0]}", drawn as above. The scripts take 1,000 images, drawn without a seed; here '
    "all are asked.",
}
_HEAD = f"""# Published numbers

What UniBiomed's scripts measure of the released checkpoint, dataset by dataset, to be filled by

```sh
{COMMAND}
```

ROOT is the folder `Biomed` of the reference's layout ([datasets](evaluation.md#datasets)); what is not in it
is passed over. The command asks everything with the paper's prompts, scores it by the
[paper's protocol](evaluation.md#paper-protocol), and writes this page with the last columns filled to
`reproduced/published_numbers.md`. Interrupted, it goes on where it was. Commands for one dataset alone need a
RUN of their own for each.

**Published** is empty wherever nobody read the number in the paper itself (arXiv:2504.21336, Nature
Communications 2026): none is copied from elsewhere, none is guessed. `published.csv` in the package's
`evaluation` takes them, each with its table. **Here** is empty until the command has run. Volumes are not in
the tables: the scripts name no list of them.
"""


def published_numbers() -> list[PublishedNumber]:
    """The table `published.csv`."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8") as file:
        return [PublishedNumber(**row) for row in csv.DictReader(file)]


def reproduce(samples: Mapping[str, Sequence[Sample]]) -> dict[tuple[str, str], Reproduced]:
    """The paper's numbers of answered records, by task and dataset."""
    found = {}
    for task, dataset in dict.fromkeys((row.task, row.dataset) for row in published_numbers()):
        of_dataset = [sample for sample in samples.get(task, ()) if sample.dataset == dataset]
        if of_dataset:
            given = {task: paper.from_samples(task, of_dataset)}
            result = scoring.score_paper(given, Repairs(allowed=True))[task]
            found[task, dataset] = Reproduced(
                result.numbers["metrics"], result.numbers["n"], result.unscored, result.notes
            )
    return found


def render(found: Mapping[tuple[str, str], Reproduced], about: Mapping[str, str]) -> str:
    """The page docs/published_numbers.md, with what was found.

    Args:
        found: by task and dataset; without any it is the page as it is shipped.
        about: what answered, such as the hash of the checkpoint.
    """
    lines = [_HEAD]
    if about:
        lines += [", ".join(f"{name} {value}" for name, value in about.items()) + ".\n"]
    for task, prompt in _PROMPTS.items():
        lines += [
            f"## {task}\n",
            f"Prompt: {prompt}\n",
            f"One dataset alone:\n\n```sh\n{_ALONE} --task {task} --datasets DATASET\n```\n",
            "| dataset | score | published | here | n |\n|---|---|---|---|---|",
        ]
        for row in published_numbers():
            if row.task == task:
                here = found.get((task, row.dataset))
                value = None if here is None else here.metrics.get(row.score)
                number = "" if value is None else f"{value:.4f}"
                n = "" if here is None else here.n
                lines.append(f"| {row.dataset} | {row.score} | {row.value} | {number} | {n} |")
        for (of_task, dataset), here in found.items():
            if of_task == task and (here.unscored or here.notes):
                said = [f"{len(here.unscored)} not scored."] if here.unscored else []
                lines.append(f"\n{dataset}: {' '.join([*said, *here.notes])}")
        lines.append("")
    return "\n".join(lines)


def to_csv(found: Mapping[tuple[str, str], Reproduced], about: Mapping[str, str]) -> str:
    """A row for each published number, those of datasets that were not there left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*PublishedNumber._fields, "here", "n", "unscored", "notes", *about])
    for row in published_numbers():
        here = found.get((row.task, row.dataset))
        if here is None:
            writer.writerow(row)
            continue
        value = here.metrics.get(row.score)
        notes = " ".join(here.notes)
        writer.writerow(
            [*row, "" if value is None else value, here.n, len(here.unscored), notes, *about.values()]
        )
    return text.getvalue()
