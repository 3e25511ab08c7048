"""How many local steps should go on while a fragment is under way, from measured times. No torch.

Every step of overlap makes what arrives one step older. So there are as few as the exchange needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

AUTO = "auto"
TIMES = 3
"""Numbers that a site tells all others with every fragment: see `needed_steps`."""
FIRST = 1
"""Steps of overlap until times have been measured."""
_SPARE = 1.25
"""A quarter more than an exchange takes: times vary."""
_AHEAD = 1
"""And a step more: sites are not at the same point of a step, and an exchange begins when the last
of them has announced it."""
_LESS = 0.6
"""A choice is taken back where so much of it would do."""


def needed_steps(told: Sequence[Sequence[float]]) -> float | None:
    """Local steps that an exchange takes, from what the sites tell of themselves; None as long as
    one of them has measured nothing, which it tells as zeros.

    `told`: of every site seconds that it took until all sites had announced the exchange, seconds
    of the exchange from then on, and seconds of a local step. Of the first only the least counts:
    the others have waited for sites that were behind. The site with most steps decides.
    """
    if not all(moved > 0 and step > 0 for _, moved, step in told):
        return None
    announced = min(seconds for seconds, _, _ in told)
    return max((announced + moved) / step for _, moved, step in told)


def most_overlap(local_steps: int) -> int:
    """Of a round's steps: a fragment must have arrived before it is sent again."""
    return local_steps - 1


def chosen_overlap(exchange_steps: float, local_steps: int) -> int:
    """Steps of overlap for an exchange that lasts as long as so many local steps.

    A quarter more than that and a step, at most one less than a round has.
    """
    if not 0 <= exchange_steps < math.inf:
        raise ValueError(f"exchange_steps must be finite and >= 0, got {exchange_steps}")
    wanted = math.ceil(_SPARE * exchange_steps + _AHEAD)
    return max(1, min(wanted, most_overlap(local_steps)))


def next_overlap(now: int, exchange_steps: float, local_steps: int) -> int:
    """As `chosen_overlap`, but `now` stays where the exchange fits and not much less would do."""
    wanted = chosen_overlap(exchange_steps, local_steps)
    fits = exchange_steps + _AHEAD <= now or now == most_overlap(local_steps)
    return now if fits and wanted > _LESS * now else wanted


def reason(overlap: int, exchange_steps: float, local_steps: int, fragments: int = 1) -> str:
    """A sentence: which overlap was chosen, and why not more."""
    plural = "" if f"{exchange_steps:.1f}" == "1.0" else "s"
    told = f"overlap {overlap}: the exchange takes {exchange_steps:.1f} step{plural}"
    help_ = "the rest is waited for (a codec of fewer bits or more local steps would help)"
    if exchange_steps > overlap:
        return (
            f"{told}; more is not possible, as a fragment is sent again after {local_steps} steps; "
            f"{help_}"
        )
    if fragments * exchange_steps > local_steps:
        return (
            f"{told}; more would not help, as the {fragments} exchanges of a round take longer "
            f"than its {local_steps} steps; {help_}"
        )
    return f"{told}; more would only make deltas older"
