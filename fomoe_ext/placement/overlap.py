"""The number of local steps that overlap with an exchange, chosen from measured times. No torch.

Each step of overlap makes the averaged values one step older when they arrive. So the overlap is
only as long as the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

AUTO = "auto"
TIMES = 3
"""How many numbers a site sends to all others with each fragment: see `needed_steps`."""
FIRST = 1
"""Steps of overlap until times have been measured."""
_SPARE = 1.25
"""Margin, because times vary: a quarter more than an exchange takes."""
_AHEAD = 1
"""Steps: sites are not at the same point of a step, and an exchange begins when the last of them
has announced it."""
_LESS = 0.6
"""The overlap becomes shorter only if at most this share of it is enough."""


def needed_steps(told: Sequence[Sequence[float]]) -> float | None:
    """How many local steps an exchange takes at the site where it takes most.

    `told`: three times in seconds from each site: from its own announcement of the exchange until
    those of all sites had arrived; from then until the exchange was complete; one local step. Of
    the first, the smallest of all sites is used, since the other sites also waited for late ones. A
    site sends zeros until it has measured something; the result is None as long as one site does.
    """
    if not all(moved > 0 and step > 0 for _, moved, step in told):
        return None
    announced = min(seconds for seconds, _, _ in told)
    return max((announced + moved) / step for _, moved, step in told)


def most_overlap(local_steps: int) -> int:
    """The longest possible overlap: a fragment must have arrived before it is sent again."""
    return local_steps - 1


def chosen_overlap(exchange_steps: float, local_steps: int) -> int:
    """The overlap for an exchange that takes as long as `exchange_steps` local steps.

    It is a quarter longer than the exchange, and a step, and at most `local_steps` - 1.
    """
    if not 0 <= exchange_steps < math.inf:
        raise ValueError(f"exchange_steps must be finite and at least 0, got {exchange_steps}")
    wanted = math.ceil(_SPARE * exchange_steps + _AHEAD)
    return max(1, min(wanted, most_overlap(local_steps)))


def next_overlap(now: int, exchange_steps: float, local_steps: int) -> int:
    """As `chosen_overlap`, but keeps the overlap `now` if it is long enough, not much too long."""
    wanted = chosen_overlap(exchange_steps, local_steps)
    fits = exchange_steps + _AHEAD <= now or now == most_overlap(local_steps)
    return now if fits and wanted > _LESS * now else wanted


def reason(overlap: int, exchange_steps: float, local_steps: int, fragments: int = 1) -> str:
    """A sentence that says which overlap was chosen and why not a longer one."""
    plural = "" if f"{exchange_steps:.1f}" == "1.0" else "s"
    told = f"overlap {overlap}: the exchange takes {exchange_steps:.1f} step{plural}"
    help_ = "sites wait for the rest (a codec with fewer bits or more local steps would help)"
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
