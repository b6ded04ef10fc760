"""This library, as the worker process that `versus_torch.py` drives."""

from __future__ import annotations

import platform
import time

import jax
from random_model import describe, question, random_model, seg_steps
from worker import serve

from unibiomed_jax import Request
from unibiomed_jax.config.fields import to_dict


def prepare(setup: dict):
    """Make the model; say its sizes, which the torch worker takes over, and the shape of the question."""
    new_tokens = setup["new_tokens"]
    model = random_model(setup["size"], setup["precision"])
    asked = question(model, 1, new_tokens)
    opened = model.open(asked.image)
    prompt = model.prompt_of(Request(asked.prompt, opened))

    def answer(case: dict) -> dict:
        request = question(model, case["segments"], new_tokens)
        begin = time.perf_counter()
        answer = model.predict_batch([request], max_new_tokens=new_tokens)[0]
        whole = time.perf_counter() - begin
        assert len(answer.segments) == case["segments"]
        return {**answer.seconds, "whole call": whole}

    facts = {
        "name": f"jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}",
        "precision": describe(model.precision),
        "config": to_dict(model.config),
        "derived": {
            "tokens_per_tile": model.config.tokens_per_tile,
            "grid": model.config.sam2.grid,
            "stage_dims": model.config.sam2.hiera.stage_dims,
        },
        "image": asked.image.size,
        "tiles": len(opened.tiles),
        "prompt_tokens": len(prompt.ids),
        "seg_steps": {n: seg_steps(n, new_tokens) for n in setup["segments"]},
    }
    return facts, answer


if __name__ == "__main__":
    serve(prepare)
