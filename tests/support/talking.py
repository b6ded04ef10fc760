"""The micro checkpoint, which says one [SEG] whatever it is asked; as a script, the command line with it."""

from __future__ import annotations

import dataclasses

from places import MICRO

from unibiomed_jax import UniBiomed, cli
from unibiomed_jax.inference import study_following


def dictate(model: UniBiomed) -> UniBiomed:
    """Make a model say "It is [SEG]. ok" to every question."""
    said = dict(enumerate(model.tokenizer.encode("It is [SEG]. ok")))
    opened = model._opened
    model._opened = lambda requests: [dataclasses.replace(r, forced=said) for r in opened(requests)]
    return model


if __name__ == "__main__":
    model = dictate(UniBiomed.from_pretrained(MICRO))
    UniBiomed.from_pretrained = lambda *_, **__: model
    study_following.KEEP_EVERY = 0.0
    cli.main()
