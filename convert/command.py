"""What the conversion commands share: one-line errors and a report of time and memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

from unibiomed_jax.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Run a command; what is wrong with its files becomes one line on stderr and exit code 1, ctrl-C 130."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
