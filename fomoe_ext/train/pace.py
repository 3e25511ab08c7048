"""How many local steps each site takes in a round if slower sites take fewer (`uneven_steps`).

Every site measures the seconds per local step and sends them in its note before a meeting. From
these notes all sites compute the same step counts for the next round, chosen so that all sites
finish at about the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

_NEWEST = 0.5
"""Weight of the newest measurement in the moving average."""


class Pace:
    """Moving average of a site's seconds per local step; 0 = not measured yet."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def took(self, steps: int, seconds: float) -> None:
        """Adds a measurement: `steps` local steps took `seconds`. No steps change nothing."""
        if steps:
            mean = seconds / steps
            known = self.seconds > 0
            self.seconds = _NEWEST * mean + (1 - _NEWEST) * self.seconds if known else mean


def steps_of_round(paces: Sequence[float], local_steps: int) -> list[int]:
    """Local steps of each site in a round. `paces`: seconds per local step, 0 = not measured.

    The fastest site takes all `local_steps`. The others take as many as fit into the same time,
    rounded, and at least one. A site that was not measured takes all. Raises ValueError for a pace
    that is negative, NaN or infinite.
    """
    for site, pace in enumerate(paces):
        if not 0 <= pace < float("inf"):
            raise ValueError(f"paces must be finite and >= 0, got {pace} for site {site}")
    fastest = min((pace for pace in paces if pace), default=0.0)
    return [max(1, round(local_steps * fastest / pace)) if pace else local_steps for pace in paces]
