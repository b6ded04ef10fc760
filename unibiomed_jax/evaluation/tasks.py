"""The tasks that can be evaluated, and what is judged of each: the one table that all else looks up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unibiomed_jax.evaluation.paper_text import clean_disease, clean_grounded, clean_region


@dataclass(frozen=True)
class Task:
    name: str
    # Masks are judged, and so is a target that is not there.
    masks: bool = False
    # Words are judged: whether they say what is true, ...
    right: bool = False
    # ... and by the n-grams that they share with it.
    ngrams: bool = False
    # What the paper's scripts keep of a model's answer: its words, and its phrases.
    clean: Callable[[str], tuple[str, list[str]]] = clean_grounded


TASKS = {
    task.name: task
    for task in (
        Task("seg2d", masks=True),
        Task("seg3d", masks=True),
        Task("disease", masks=True, right=True, clean=clean_disease),
        Task("region", right=True, clean=lambda answer: (clean_region(answer), [])),
        Task("gvqa", masks=True, right=True, ngrams=True),
        Task("report", masks=True, ngrams=True),
        Task("caption", ngrams=True),
        Task("vqa", right=True, ngrams=True),
    )
}
