"""What a site does in a meeting besides the meeting itself (`fomoe_ext.outer`): the reshuffle where
one is due, shadow copies, the routing probe, and its counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from fomoe_ext.outer.averaging import Treatment
from fomoe_ext.outer.reports import RoundReport
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import traffic as plan
from fomoe_ext.train.probing import SiteProbe
from fomoe_ext.train.state import SiteState


class Meetings:
    """The meetings of one rank of a site."""

    def __init__(self, site: SiteState, before_change: Callable[[], None]) -> None:
        """`before_change` is called when a meeting is about to change the model."""
        self._site, self._before_change = site, before_change
        self._probe = SiteProbe(site) if site.config.run.probe_tokens else None

    def meet(self) -> float:
        """The meeting, and a reshuffle where one is due.

        Returns the seconds it took; with ddp those of all reductions of the round.
        """
        site = self._site
        self._before_change()
        if self._probe is not None:
            self._probe.before_meeting()
        seconds = self.count(site.placement, site.sync.step(site.progress.tokens))
        if site.config.fault.shadow_experts:
            seconds += self._refresh_shadows()
        every = site.config.sites.reshuffle_rounds
        if every and site.round % every == 0 and site.round < site.rounds:
            seconds += self._reshuffle(plan.job_placement(site.config, site.round // every))
        if self._probe is not None:
            self._probe.after_meeting()
        return seconds

    def finish(self) -> None:
        """Takes in what is under way, after the last round; a collective."""
        self._before_change()
        outcome = self._site.sync.finish()
        self._site.tally.meeting_s += outcome.seconds
        self._tell_of(outcome)

    def count(self, placement: Placement, outcome: RoundReport) -> float:
        """Counts what a meeting of `placement` was, and begins the next round; returns the seconds
        it took."""
        site, progress = self._site, self._site.progress
        self._tell_of(outcome)
        site.tally.rows += int(progress.rows)
        site.tally.slots += progress.slots
        if site.world.rank == 0:
            site.tally.planned_bytes += plan.meeting_bytes(
                site.config, placement, site.world.site, site.round
            )
        # What slower sites have not taken of the round's data is taken by nobody, so that all go on
        # from the same place in the stream.
        site.batches.skip(site.local_steps - progress.steps)
        progress.begin_next()
        return outcome.seconds

    def _reshuffle(self, new: Placement) -> float:
        """Moves experts to where the new placement has them; the seconds it took."""
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
        """Brings shadow copies up to the last meeting; the seconds it took."""
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
            print(
                f"site {site.world.site}: restored from the majority after round {site.round}: "
                f"{', '.join(outcome.healed)}",
                file=sys.stderr,
                flush=True,
            )

    def _tell_of_treatment(self, treatment: Treatment) -> None:
        world, tally = self._site.world, self._site.tally
        if world.site in treatment.left_out:
            tally.left_out += 1
            if world.rank == 0:
                print(
                    f"site {world.number}: what it had after round {self._site.round} was NaN or "
                    "infinite: left out, it goes on with what the others have agreed on",
                    file=sys.stderr,
                    flush=True,
                )
        elif treatment.factors and treatment.factors[world.site] < 1:
            tally.clipped += 1
            tally.least_factor = min(tally.least_factor, treatment.factors[world.site])
