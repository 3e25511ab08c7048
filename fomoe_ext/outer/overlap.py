"""OverlapTimes: a site's times of local steps and exchanges, and the overlap chosen by all sites'.

Sites tell each other their times with every fragment that they send. So all know the same numbers
when it arrives, at the same local step, and choose alike.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fomoe_ext.outer.options import OuterOptions
from fomoe_ext.placement.overlap import (
    AUTO,
    FIRST,
    most_overlap,
    needed_steps,
    next_overlap,
    reason,
)

_log = logging.getLogger(__name__)
_NEWEST = 64
"""So many of the last local steps are measured by their median."""
_EXCHANGES = 5
"""And so many of the last exchanges of a fragment. A single late one changes no choice. Where now
one site is behind and now another, all usually wait a little, which then counts."""


class OverlapTimes:
    """The steps of overlap in force, and with "auto" what they are chosen by.

    steps: of overlap, for fragments that are sent from now on. reason: why so many, in words; empty
    as long as nothing has been chosen. clock: seconds, replaced by tests.
    """

    def __init__(self, options: OuterOptions) -> None:
        self.chosen = options.overlap == AUTO
        self.steps = FIRST if isinstance(options.overlap, str) else options.overlap
        self.reason = ""
        self.clock = time.perf_counter
        self._local_steps, self._fragments = options.local_steps or 1, options.fragments
        self._begun: float | None = None
        """When the local step under way began; None where it is not measured."""
        self._of_steps: list[float] = []
        self._of_fragments: dict[int, list[tuple[float, float]]] = {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """The overlap that a run had before, and the reason: of `OuterSync.state_dict`, of which
        earlier ones lack them. One that is given, not chosen, stays."""
        if self.chosen and (steps := int(state.get("overlap", 0))):
            self.steps = min(steps, most_overlap(self._local_steps))
            self.reason = str(state.get("overlap_reason", ""))

    # ---- what is measured

    def step_ended(self) -> None:
        """A local step is over."""
        if self._begun is not None:
            self._of_steps = [*self._of_steps[1 - _NEWEST :], self.clock() - self._begun]
        self._begun = None

    def step_begins(self) -> None:
        """The next one begins: nothing else will be done before it. (After the last of a round
        there may be a validation, or a checkpoint.)"""
        self._begun = self.clock()

    def not_a_step(self) -> None:
        """What comes now is no local step."""
        self._begun = None

    def exchanged(self, fragment: int, announced_s: float, moved_s: float) -> None:
        """An exchange of a fragment: seconds until all sites had announced it, and from then on."""
        before = self._of_fragments.get(fragment, [])
        self._of_fragments[fragment] = [*before[1 - _EXCHANGES :], (announced_s, moved_s)]

    def told(self) -> tuple[float, float, float]:
        """What this site tells all others (`placement.overlap.needed_steps`): of the fragment that
        takes longest. Zeros as long as nothing has been measured."""
        if not (self._of_fragments and self._of_steps):
            return 0.0, 0.0, 0.0
        usual = [
            tuple(map(statistics.median, zip(*times, strict=True)))
            for times in self._of_fragments.values()
        ]
        announced, moved = max(usual, key=lambda times: times[1])
        return announced, moved, statistics.median(self._of_steps)

    # ---- what is chosen

    def choose(self, of_sites: Sequence[Sequence[float]]) -> None:
        """Goes by the times that all sites have told, at the same local step of all of them."""
        needed = needed_steps(of_sites) if self.chosen else None
        if needed is None:
            return
        steps = next_overlap(self.steps, needed, self._local_steps)
        if steps != self.steps or not self.reason:
            self.steps = steps
            self.reason = reason(steps, needed, self._local_steps, self._fragments)
            _log.info("%s", self.reason)
