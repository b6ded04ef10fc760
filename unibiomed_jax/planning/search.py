"""The largest batch that fits, and the best of several strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unibiomed_jax.errors import InputError
from unibiomed_jax.planning.facts import Facts
from unibiomed_jax.planning.programs import Case
from unibiomed_jax.planning.report import fits
from unibiomed_jax.planning.roofline import estimate

# Samples a share beyond which nobody looks.
MOST = 256


def largest_batches(
    strategies: Sequence[str],
    case: Callable[[str, int], Case],
    find_all: Callable[[list[Case]], list[Facts | InputError]],
) -> dict[str, Facts | InputError]:
    """The plan of the largest batch that fits, by strategy; of what never fits, that of one sample a share.

    Doubled until it does not fit, then halved in between, for all strategies at a time.

    Args:
        strategies: to look at.
        case: of a strategy and a number of samples a share.
        find_all: compiles cases beside each other.
    """
    found: dict[str, Facts | InputError] = {}
    fitting, missing = dict.fromkeys(strategies, 0), dict.fromkeys(strategies, MOST + 1)
    going = {strategy: 1 for strategy in strategies}
    while going:
        results = find_all([case(strategy, size) for strategy, size in going.items()])
        for (strategy, size), result in zip(list(going.items()), results, strict=True):
            enough = not isinstance(result, InputError) and fits(result)[0]
            if enough or strategy not in found:
                found[strategy] = result
            if enough:
                fitting[strategy] = size
            else:
                missing[strategy] = size
            low, high = fitting[strategy], missing[strategy]
            if high - low <= 1:
                del going[strategy]
            elif high > MOST:
                going[strategy] = min(2 * size, MOST)
            else:
                going[strategy] = (low + high) // 2
    return found


def best(plans: Sequence[Facts]) -> Facts | None:
    """The plan with most samples a second of those that fit."""
    fitting = [facts for facts in plans if fits(facts)[0]]
    return max(fitting, key=lambda facts: estimate(facts).samples_per_second, default=None)
