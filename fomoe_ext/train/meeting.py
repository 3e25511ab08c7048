"""What a site does around a meeting (`fomoe_ext.outer` holds it): a reshuffle if one is due, shadow
copies, the routing probe, and the counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fomoe_ext.outer.averaging import Treatment
from fomoe_ext.outer.reports import RoundReport
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import traffic as plan
from fomoe_ext.train.probing import SiteProbe
from fomoe_ext.train.state import SiteState

_log = logging.getLogger(__name__)


class Meetings:
    """The meetings of one rank of a site."""

    def __init__(self, site: SiteState, before_change: Callable[[], None]) -> None:
        """`before_change` is called before a meeting changes the model."""
        self._site, self._before_change = site, before_change
        self._probe = SiteProbe(site) if site.config.run.probe_tokens else None

    def meet(self) -> float:
        """Holds the meeting, and a reshuffle if one is due.

        Returns the seconds spent; with ddp, those of all gradient reductions of the round.
        """
        site = self._site
        self._before_change()
        if self._probe is not None:
            self._probe.before_meeting()
        with site.course.explained(site.round + 1, None):
            outcome = site.sync.step(site.progress.tokens)
        seconds = self.count(site.placement, outcome)
        if site.config.fault.shadow_experts:
            seconds += self._refresh_shadows()
        every = site.config.sites.reshuffle_rounds
        if every and site.round % every == 0 and site.round < site.rounds:
            seconds += self._reshuffle(plan.job_placement(site.config, site.round // every))
        if self._probe is not None:
            self._probe.after_meeting()
        return seconds

    def finish(self) -> None:
        """Waits for exchanges that overlap local steps and applies them, after the last round.

        A collective.
        """
        self._before_change()
        outcome = self._site.sync.finish()
        self._site.tally.meeting_s += outcome.seconds
        self._tell_of(outcome)

    def count(self, placement: Placement, outcome: RoundReport) -> float:
        """Counts a meeting that was held with `placement` and begins the next round.

        Returns the seconds that the meeting took.
        """
        site, progress = self._site, self._site.progress
        self._tell_of(outcome)
        site.tally.rows += int(progress.rows)
        site.tally.slots += progress.slots
        if site.world.rank == 0:
            site.tally.planned_bytes += plan.meeting_bytes(
                site.config, placement, site.world.site, site.round
            )
        # A site that took fewer steps skips the rest of the round's batches: all sites continue
        # from the same position in the data.
        site.batches.skip(site.local_steps - progress.steps)
        progress.begin_next()
        return outcome.seconds

    def _reshuffle(self, new: Placement) -> float:
        """Moves experts to the sites that hold them in the new placement; returns the seconds."""
        site, old = self._site, self._site.placement
        moved = site.sync.reshuffle(
            new,
            warmup_steps=site.config.sites.resolved_warmup,
            moments=site.config.sites.reshuffle_moments,
        )
        site.tally.moved_bytes += moved.bytes_sent
        site.tally.planned_bytes += plan.moved_bytes(site.config, old, new, site.world.site)
        return moved.seconds

    def _refresh_shadows(self) -> float:
        """Updates the shadow copies to the state after the meeting; returns the seconds."""
        site, start = self._site, time.perf_counter()
        with site.sync.log.meeting("the refresh of shadow copies"):
            site.sync.log.sent(site.shadows.refresh(site.sync))
        site.tally.planned_bytes += plan.shadow_bytes(site.config, site.placement, site.world.site)
        return time.perf_counter() - start

    def _tell_of(self, outcome: RoundReport) -> None:
        site = self._site
        site.tally.exchange_s += outcome.exchange_s
        site.tally.healed += len(outcome.healed)
        self._tell_of_treatment(outcome.treatment)
        if outcome.healed and site.world.rank == 0:
            _log.warning(
                "site %d: restored from the majority after round %d: %s",
                site.world.site,
                site.round,
                ", ".join(outcome.healed),
            )

    def _tell_of_treatment(self, treatment: Treatment) -> None:
        world, tally = self._site.world, self._site.tally
        if world.site in treatment.left_out:
            tally.left_out += 1
            if world.rank == 0:
                _log.warning(
                    "site %d: its parameters after round %d were NaN or infinite; the meeting left "
                    "them out, and the site continues with the mean of the others",
                    world.number,
                    self._site.round,
                )
        elif treatment.factors and treatment.factors[world.site] < 1:
            tally.clipped += 1
            tally.least_factor = min(tally.least_factor, treatment.factors[world.site])
