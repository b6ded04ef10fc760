"""Which file a message means, without its name."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A file by the folder that was asked for: messages say which it is without its name."""

    path: Path
    # Number in the folder, from 1 in the order of the names, or in the DICOMDIR that lists it; None if the
    # file itself was asked for.
    number: int | None = None
    listed: bool = False

    def __str__(self) -> str:
        if self.number is None:
            return "The file"
        return f"File {self.number} of the " + ("DICOMDIR" if self.listed else "folder (by name)")
