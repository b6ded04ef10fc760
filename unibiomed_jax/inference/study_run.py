"""A question about a study that is being answered: its slices, and the masks kept so far."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Bool
from PIL import Image

from unibiomed_jax.errors import InputError
from unibiomed_jax.inference.kept import Kept
from unibiomed_jax.inference.study_question import Answerer, StudyQuestion
from unibiomed_jax.studies.grey import to_grey
from unibiomed_jax.studies.study import Study
from unibiomed_jax.studies.views import View
from unibiomed_jax.studies.windows import Window

# Told what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]
# Under what names masks of slices are kept.
FIRST, FOLLOWED = "first_{:05d}", "slice_{:05d}"


@dataclasses.dataclass
class Asking:
    """A question that is being answered."""

    model: Answerer
    study: Study
    prompt: str
    question: StudyQuestion
    window: Window | None
    view: View
    kept: Kept
    progress: Progress
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    @property
    def slices(self) -> int:
        return len(self.study.values)

    def frame(self, index: int) -> Image.Image:
        """A slice as the checkpoint knows it."""
        truncate = self.model.config.preprocessing.truncate
        if self.window is None:
            pixels = self.study.values[index]
        else:
            pixels = to_grey(self.study, self.window, truncate=truncate, index=index)
        return Image.fromarray(np.ascontiguousarray(self.view.show(pixels))).convert("RGB")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begin

    def packed(self, masks: Sequence[Bool[np.ndarray, "rows columns"]]) -> dict[str, np.ndarray]:
        """Masks of the view on the stored slice, a bit a pixel."""
        stored = [np.packbits(self.view.restore(mask)) for mask in masks]
        pixels = self.view.rows * self.view.columns
        return {"masks": np.array(stored, np.uint8).reshape(len(stored), -(-pixels // 8))}

    def found(self, name: str, index: int) -> dict[str, np.ndarray]:
        """What was kept of a slice, `name` FIRST or FOLLOWED."""
        found = self.kept.get(name.format(index))
        if found is None:
            raise InputError("What was half done is damaged; run the same command again.")
        return found
