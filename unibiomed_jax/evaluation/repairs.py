"""What the reference's scorers fail at, or silently get wrong."""

from __future__ import annotations

from unibiomed_jax.errors import InputError
from unibiomed_jax.files import shown


class Repairs:
    """Refuses what the reference's scorers fail at; or, if allowed, has it done sensibly and notes it.

    `notes` says what was repaired, one sentence each; they belong beside the numbers.
    """

    def __init__(self, allowed: bool = False):
        self.allowed = allowed
        self.notes: list[str] = []

    def repair(self, where: str, *, reference: str, instead: str) -> None:
        """To be called before a repair is made.

        Args:
            where: what was found and in what: "liver.png has no prediction".
            reference: what the reference does then: "stops with FileNotFoundError".
            instead: what the caller is going to do: "count it as an empty mask".

        Raises:
            InputError: repairs are not allowed.
        """
        if not self.allowed:
            raise InputError(f"{shown(where)}, where the reference {reference}; pass --repair to {instead}.")
        self.notes.append(f"{shown(where)}: repaired to {instead}; the reference {reference}.")
