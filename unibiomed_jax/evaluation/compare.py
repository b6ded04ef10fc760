"""Two runs on the same records: by how much the second is better, and whether that is chance."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation.bootstrap import Estimate, estimate_difference
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.evaluation.scoring import cases
from unibiomed_jax.files import shown, write_beside


@dataclass(frozen=True)
class Difference:
    """A mean of a score of one task: of both runs, and what the second has more."""

    task: str
    first: Estimate
    second: Estimate
    difference: Estimate

    @property
    def certain(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        interval = self.difference.interval
        return interval is not None and not interval[0] <= 0 <= interval[1]


def compare(
    first: Mapping[str, Sequence[Sample]], second: Mapping[str, Sequence[Sample]], names: tuple[Path, Path]
) -> tuple[list[Difference], dict[str, int]]:
    """All scores that both runs have, over the records that both scored.

    Args:
        first: records of the first run with their strict scores, by task.
        second: those of the second.
        names: of both, for messages.

    Returns:
        The differences, and of every task how many records only one of the runs scored.

    Raises:
        InputError: they have no scored record in common, or asked different things under one doc_id.
    """
    found: list[Difference] = []
    alone: dict[str, int] = {}
    for task in [task for task in first if task in second]:
        ours, theirs = ({s.doc_id: s for s in run[task] if s.scores.get("strict")} for run in (first, second))
        both = [name for name in ours if name in theirs]
        for name in both:
            if ours[name].doc_hash != theirs[name].doc_hash:
                raise InputError(
                    f"{shown(name)} of {task} is another record in {shown(names[0])} than in "
                    f"{shown(names[1])}; compare runs over the same data."
                )
        alone[task] = len(ours) + len(theirs) - 2 * len(both)
        pairs = [(ours[name], theirs[name]) for name in both]
        if not pairs:
            continue
        one, other = (cases(samples) for samples in zip(*pairs, strict=True))
        found += [Difference(task, *estimates) for estimates in estimate_difference(one, other)]
    if not found:
        raise InputError(
            f"{shown(names[0])} and {shown(names[1])} have no scored record in common; score both with "
            "`unibiomed eval --mode score --protocol strict` first."
        )
    return found, alone


COLUMNS = "task dataset target score first second difference low high n patients".split()


def write_csv(path: Path, differences: Sequence[Difference]) -> None:
    """A row for every difference."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for found in differences:
        of = found.difference
        writer.writerow(
            [found.task, of.dataset, of.target, of.score, found.first.value, found.second.value, of.value]
            + [*(of.interval or (None, None)), of.cases, of.patients]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, table.getvalue().encode("utf-8", "backslashreplace"))
