"""How many local steps each site takes in a round, where slower sites take fewer of them.

Every site measures the seconds of its local steps and tells them in its note before a meeting. From
the same notes all sites compute alike how many steps each takes in the next round, so that all are
done at about the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

_NEWEST = 0.5
"""What the newest measurement weighs against all before it."""


class Pace:
    """A site's seconds per local step, the newest the most; 0 = not known yet."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def took(self, steps: int, seconds: float) -> None:
        """So many steps have taken so long; nothing is learned from none."""
        if steps:
            mean = seconds / steps
            known = self.seconds > 0
            self.seconds = _NEWEST * mean + (1 - _NEWEST) * self.seconds if known else mean


def steps_of_round(paces: Sequence[float], local_steps: int) -> list[int]:
    """Local steps of each site in a round, from the seconds that a step takes each, 0 = not known.

    The fastest takes all `local_steps`, the others what they have time for meanwhile, rounded, but
    at least one; one that is not known takes all. Raises ValueError for a pace that is negative,
    NaN or infinite.
    """
    for site, pace in enumerate(paces):
        if not 0 <= pace < float("inf"):
            raise ValueError(f"paces must be finite and >= 0, got {pace} of site {site}")
    fastest = min((pace for pace in paces if pace), default=0.0)
    return [max(1, round(local_steps * fastest / pace)) if pace else local_steps for pace in paces]
