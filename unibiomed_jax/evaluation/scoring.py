"""Scores of a run's records, and the files that say them: results.json and results.csv."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unibiomed_jax.errors import InputError
from unibiomed_jax.evaluation import paper, records, strict
from unibiomed_jax.evaluation.bootstrap import Case, Estimate, estimate
from unibiomed_jax.evaluation.object_score import object_score_table
from unibiomed_jax.evaluation.paper_text import TextItem, one_line
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.evaluation.repairs import Repairs
from unibiomed_jax.evaluation.tasks import TASKS
from unibiomed_jax.evaluation.text import TextScores, score_texts
from unibiomed_jax.evaluation.vqa_rules import score_answer
from unibiomed_jax.files import read_json, shown, write_beside

RESULTS = "results.json"
VERSIONS = ("unibiomed-jax", "jax", "numpy", "scipy", "pillow")
# Text metrics that are means over the texts; the others are of all texts together.
MEANS = ("ROUGE_L", "CIDEr")
# The dataset and target of records that name none.
UNNAMED = "unnamed"
# Columns of results.csv.
COLUMNS = (
    "task protocol dataset target score value low high micro micro_low micro_high n patients checkpoint data "
    "versions"
).split()


@dataclass
class TaskResult:
    """The numbers of one task under one protocol."""

    task: str
    protocol: str
    numbers: dict[str, Any]
    # What was not scored, and why.
    unscored: dict[str, str] = field(default_factory=dict)
    # What a reader of the numbers has to know.
    notes: list[str] = field(default_factory=list)


def score_paper(inputs: Mapping[str, paper.PaperInput], repairs: Repairs) -> dict[str, TaskResult]:
    """All tasks by the paper's protocol.

    Raises:
        InputError: the reference would fail, and repairs are not allowed.
    """
    inputs = {
        task: given.one_line(repairs) if TASKS[task].ngrams else given for task, given in inputs.items()
    }
    texts = score_texts({task: given.texts for task, given in inputs.items() if TASKS[task].ngrams})
    results = {}
    for task, given in inputs.items():
        before = len(repairs.notes)
        numbers = paper.score(task, given, texts.get(task), repairs)
        notes = [*given.notes, *repairs.notes[before:], *_notes(texts.get(task))]
        results[task] = TaskResult(task, "paper", numbers, given.unscored, notes)
    return results


def score_strict(
    samples: Mapping[str, Sequence[Sample]],
    tolerances: Mapping[str, float] | None = None,
    rules: Sequence[str] = (),
) -> tuple[dict[str, TaskResult], dict[str, list[Sample]]]:
    """All tasks by the strict protocol, and the records with their scores.

    Args:
        samples: of every task.
        tolerances: of the surface Dice by target, mm.
        rules: of `vqa_rules.RULES`, for closed and open questions.
    """
    unscored: dict[str, dict[str, str]] = {task: {} for task in samples}
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for task, of_task in samples.items():
        scores[task] = _score_samples(task, of_task, tolerances, rules, unscored[task])
    corpora = {
        task: one_line(
            [
                TextItem(sample.doc_id, sample.answer, sample.prediction or "")
                for sample in of_task
                if sample.doc_id in scores[task] and sample.answer is not None
            ],
            Repairs(allowed=True),
        )
        for task, of_task in samples.items()
        if TASKS[task].ngrams
    }
    texts = score_texts(corpora)
    results, scored = {}, {}
    for task, of_task in samples.items():
        if task in texts:
            for item, more in zip(corpora[task], texts[task].items, strict=True):
                scores[task][item.name] |= {name: more[name] for name in MEANS}
        scored[task] = [
            records.with_scores(sample, "strict", scores[task].get(sample.doc_id, {})) for sample in of_task
        ]
        estimates = estimate(cases(scored[task]))
        notes = _notes(texts.get(task))
        if any(sample.patient is None for sample in of_task):
            notes.append("Some records name no patient: for the intervals each of their images is one.")
        if any(found.interval is None for found in estimates):
            notes.append("Means over fewer than 5 patients have no interval.")
        few = {(found.dataset, found.target) for found in estimates if found.target and not found.interval}
        if few and any(found.interval is not None and found.target is None for found in estimates):
            notes.append(
                f"Targets of fewer than 5 patients: {len(few)}. Many draws leave them out, so that intervals "
                "of means over targets may lie beside the mean."
            )
        numbers: dict[str, Any] = {"estimates": [to_json(found) for found in estimates]}
        if groups := [to_json(found) for found in _estimate_groups(scored[task])]:
            numbers["groups"] = groups
        if task in texts:  # of the whole, not means of the records
            whole = texts[task].whole.items()
            numbers["corpus"] = {name: value for name, value in whole if name not in MEANS}
        if (found := object_score_table(scored[task])) is not None:
            numbers["object_score"] = found
            notes.append(_about_object_score(found))
        numbers["n"] = len(scores[task])
        results[task] = TaskResult(task, "strict", numbers, unscored[task], notes)
    return results, scored


def _score_samples(
    task: str,
    samples: Sequence[Sample],
    tolerances: Mapping[str, float] | None,
    rules: Sequence[str],
    unscored: dict[str, str],
) -> dict[str, dict[str, float]]:
    """The scores by doc_id; what has none goes to `unscored` with its reason."""

    def judged(sample: Sample) -> bool:
        return bool(sample.truth_masks) and TASKS[task].masks  # the mask of a region is what is shown

    def of_one(sample: Sample) -> dict[str, float] | str:
        if sample.reason is not None:
            return sample.reason
        try:
            found = strict.score_masks(sample, tolerances) if judged(sample) else {}
        except strict.NotComparable as error:
            return str(error)
        if TASKS[task].right and sample.answer is not None:
            found |= right(sample.answer, sample.prediction or "") | score_answer(sample, rules)
        return (
            found if found or sample.answer is not None else "neither a truth mask nor an answer to compare"
        )

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        found = dict(zip([sample.doc_id for sample in samples], pool.map(of_one, samples), strict=True))
    unscored |= {doc_id: reason for doc_id, reason in found.items() if isinstance(reason, str)}
    return {doc_id: scores for doc_id, scores in found.items() if not isinstance(scores, str)}


def right(truth: str, said: str) -> dict[str, float]:
    """Whether an answer is the truth, and whether it holds it as whole words.

    Case, blanks and the last full stop do not matter.
    """
    truth, said = (" ".join(text.lower().split()).rstrip(". ") for text in (truth, said))
    if not truth:
        return {"exact": float(not said), "holds": float(not said)}
    holds = re.search(rf"(?<!\w){re.escape(truth)}(?!\w)", said) is not None
    return {"exact": float(truth == said), "holds": float(holds)}


def cases(samples: Sequence[Sample]) -> list[Case]:
    """What the bootstrap takes of scored records."""
    return [
        Case(sample.dataset or UNNAMED, sample.category or UNNAMED, sample.group, sample.scores["strict"])
        for sample in samples
        if sample.scores.get("strict")
    ]


def _estimate_groups(samples: Sequence[Sample]) -> list[Estimate]:
    """Means by modality, type of question and whatever else the records can be grouped by."""
    found = []
    for name in dict.fromkeys(name for sample in samples for name in sample.groups):
        grouped = [
            replace(sample, category=f"{name}: {sample.groups[name]}")
            for sample in samples
            if name in sample.groups
        ]
        found += [each for each in estimate(cases(grouped)) if each.target is not None]
    return found


def to_json(found: Estimate) -> dict[str, Any]:
    return dict(vars(found))


def _notes(texts: TextScores | None) -> list[str]:
    return [] if texts is None else [f"Tokens of the texts: {texts.tokens}.", *texts.missing]


def _about_object_score(found: Mapping[str, Any]) -> str:
    """Whether masks may be hidden by the object score, in a sentence."""
    if found["constant"]:
        return (
            f"The object score is {found['highest']:.3f} for every mask: the head that gives it was never "
            "trained, and --hide-absent must not be used with this checkpoint."
        )
    if found["auroc"] is None:
        kinds = "present" if found["present"] else "absent"
        return (
            f"All targets are {kinds}: the object score cannot be judged; ask about both kinds before "
            "hiding masks by it."
        )
    low, high = found["auroc_interval"] or (math.nan, math.nan)
    middle = next(row for row in found["thresholds"] if row["above"] == 0)
    return (
        f"Object score: AUROC {found['auroc']:.3f} ({low:.3f} to {high:.3f}) over {found['present']} present "
        f"and {found['absent']} absent targets; hide_absent would hide {middle['absent_hidden']:.0%} of the "
        f"absent and {middle['present_hidden']:.0%} of the present ones, Dice over all {found['dice']:.3f} "
        f"becomes {middle['dice']:.3f}."
    )


def hash_table(path: Path) -> str | None:
    """Of a table that is scored without records; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def hash_data(samples: Mapping[str, Sequence[Sample]]) -> str:
    """Of what was asked and what is true, whatever was answered."""
    keys = sorted(sample.key for of_task in samples.values() for sample in of_task)
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def write_results(
    run: Path, results: Sequence[TaskResult], *, checkpoint: str | None, data: str | None
) -> None:
    """results.json with everything, results.csv with a row a number.

    Args:
        run: folder of the run.
        results: of all tasks and protocols.
        checkpoint: hash of what answered, if it is known.
        data: hash of the records, or of the table.
    """
    stamp = {"checkpoint": checkpoint, "data": data}
    content = {
        **stamp,
        "versions": versions(),
        "results": [vars(result) for result in results],
    }
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False)
    write_beside(run / RESULTS, text.encode("utf-8", "backslashreplace"))
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows(results):
        writer.writerow(row | stamp | {"versions": ", ".join(map(" ".join, versions().items()))})
    write_beside(run / "results.csv", table.getvalue().encode("utf-8", "backslashreplace"))


def versions() -> dict[str, str]:
    """What computed, by package."""
    return {name: version(name) for name in VERSIONS}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """A row for every number, with its task, protocol and count."""
    found: list[dict[str, Any]] = []
    for result in results:
        start = {"task": result.task, "protocol": result.protocol, "n": result.numbers["n"]}
        single = result.numbers.get("metrics", {}) | result.numbers.get("corpus", {})
        for name, value in single.items():
            n = result.numbers["images"] if name == "mdice" else start["n"]
            found.append(start | {"score": name, "value": value, "n": n})
        for target, scores in result.numbers.get("classes", {}).items():
            found += [start | {"target": target, "score": name, "value": scores[name]} for name in scores]
        for one in result.numbers.get("estimates", []) + result.numbers.get("groups", []):
            low, high = one["interval"] or (None, None)
            micro_low, micro_high = one["micro_interval"] or (None, None)
            found.append(
                start
                | {name: one[name] for name in ("dataset", "target", "score", "value", "micro", "patients")}
                | {
                    "low": low,
                    "high": high,
                    "micro_low": micro_low,
                    "micro_high": micro_high,
                    "n": one["cases"],
                }
            )
    return found


def read_run(run: Path, tasks: Sequence[str]) -> dict[str, list[Sample]]:
    """The records of a run, of these tasks or of all that it has.

    Raises:
        InputError: the folder holds none of them.
    """
    wanted = tasks or [name for name in TASKS if records.samples_file(run, name).exists()]
    if not wanted:
        raise InputError(
            f"{shown(run)} holds no samples_TASK.jsonl; answer questions first, or correct --out."
        )
    return {task: records.read_samples(records.samples_file(run, task), task) for task in wanted}


def read_tolerances(path: Path | None) -> dict[str, float]:
    """Tolerances of the surface Dice by target, mm, from a JSON file.

    Raises:
        InputError: it is no such table.
    """
    if path is None:
        return {}
    table = read_json(path, remedy='write {"target": millimetres, ...}')
    if not isinstance(table, dict) or not all(
        isinstance(value, int | float) and 0 < value < math.inf for value in table.values()
    ):
        raise InputError(f'{shown(path)} is no table {{"target": millimetres, ...}}; correct it.')
    return table
