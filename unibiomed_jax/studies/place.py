"""Which file a message means, without its name."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A file by the folder that was asked for: messages say which it is without its name."""

    path: Path
    # Number in the folder, from 1 in the order of the names; None if the file itself was asked for.
    number: int | None = None

    def __str__(self) -> str:
        return "The file" if self.number is None else f"File {self.number} of the folder (by name)"
