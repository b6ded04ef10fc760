"""What `unibiomed eval` prints, of which only the first process of a job says anything."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

console = Console()
# Names of what was not answered or scored that are printed; all are in the run's files.
NAMED = 5


def say(sentence: str) -> None:
    """One sentence, in which names of files and records are no markup."""
    console.print(escape(sentence), highlight=False, soft_wrap=True)


def number(value: float | None) -> str:
    """A score, if there is one."""
    return "none" if value is None else f"{value:.4f}"
