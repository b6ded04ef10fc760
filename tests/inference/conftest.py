"""The predictor that the recordings of the reference are compared with, and what it computes on the way."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from places import GOLDEN, MICRO

from unibiomed_jax import UniBiomed
from unibiomed_jax.config.precision import FLOAT32

STAGES = {
    *("encode_tiles", "blank_rows", "lay_tile", "prefill", "advance", "states_at"),
    *("encode_image", "segment", "segment_frames", "empty_track", "segment_step", "ground"),
}


@pytest.fixture(scope="session")
def model() -> UniBiomed:
    return UniBiomed.from_pretrained(MICRO, precision=FLOAT32)


@pytest.fixture(scope="session")
def image() -> Image.Image:
    return Image.open(GOLDEN / "images" / "CT_abdomen.png")


@pytest.fixture
def watch_calls(monkeypatch):
    """Of a predictor, what every stage has given, and the ids and states of answers, call by call."""

    def watch(model: UniBiomed) -> dict[str, list]:
        seen: dict[str, list] = {}

        def record(owner, name: str) -> None:
            function, seen[name] = getattr(owner, name), []

            def call(*arguments, **options):
                seen[name].append(function(*arguments, **options))
                return seen[name][-1]

            monkeypatch.setattr(owner, name, call)

        finish, seen["said"] = model._finish, []

        def call_finish(answering, hide_absent):
            seen["said"].append((answering.said, list(np.asarray(answering.state.hidden))))
            return finish(answering, hide_absent)

        monkeypatch.setattr(model, "_finish", call_finish)
        for name, stage in list(vars(model.stages).items()):
            if hasattr(stage, "lower"):  # a compiled function
                record(model.stages, name)
        assert seen.keys() == {"said", *STAGES}
        return seen

    return watch


@pytest.fixture
def results(model, watch_calls) -> dict[str, list]:
    return watch_calls(model)
