"""`unibiomed eval list`: which published datasets can be asked."""

from __future__ import annotations

from unibiomed_jax.commands.eval.options import ListOptions
from unibiomed_jax.commands.eval.printing import say
from unibiomed_jax.commands.run import DONE


def list_known(options: ListOptions) -> int:
    """Run `unibiomed eval list`."""
    from unibiomed_jax.evaluation.readers.known import known_datasets

    del options
    for known in known_datasets():
        say(f"{known.name}: --format {known.format}; {known.tasks}; --split {known.splits}")
        say(f"    licence: {known.licence}")
        say(f"    from: {known.where}")
    return DONE
