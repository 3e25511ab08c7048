"""Driver: holds a site's meetings, when and as far as they are due; here the site waits for each.

Meetings that go on behind local steps, or that all sites apply or none, take the same steps
(`fomoe_ext.outer.meeting`) at other times: `flight.InFlight` and `staged.Staged`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from fomoe_ext.outer.agreement import Agreement
from fomoe_ext.outer.background import Background
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.log import MeetingLog
from fomoe_ext.outer.meeting import Meeting
from fomoe_ext.outer.overlap import OverlapTimes
from fomoe_ext.outer.reduce import Bucket, exchange
from fomoe_ext.outer.routed import TokenCounts
from fomoe_ext.outer.stale import StaleCopies
from fomoe_ext.outer.state import OuterState
from fomoe_ext.outer.step_count import StepCount
from fomoe_ext.placement import stale, wire


@dataclass
class Pending:
    """With `staged`: a meeting that is neither applied nor taken back.

    `errors`: the error feedback as it was before. `arrived`: whether all of it is here.
    """

    meeting: Meeting
    buckets: list[Bucket]
    errors: list[tuple[Tensor, Tensor]]
    arrived: bool = False
    bytes_sent: int = 0


class Driver:
    """Every meeting is held at once, from its check to its verification.

    With `fragments` at several steps of a round, else at its end. times: how many local steps go on
    meanwhile, which are none here.
    """

    def __init__(
        self,
        state: OuterState,
        counts: TokenCounts,
        steps: StepCount,
        log: MeetingLog,
        copies: StaleCopies | None = None,
    ) -> None:
        """`copies`: frozen ones of absent experts, to be refreshed after meetings."""
        self._state, self._counts, self._steps, self._log = state, counts, steps, log
        self._site, self._copies = state.layout.site, copies
        self._options = self._site.options
        self._background = Background()
        self.pending: Pending | None = None
        self.times = OverlapTimes(self._options)

    # ----------------------------------------------------------------------------- when it is due

    def hold_round(self) -> None:
        """The meeting at the end of a round.

        Raises MeetingError where it is not the end of one.
        """
        if self._options.staggered:
            steps, since = self._options.local_steps, self._steps.since
            if since != steps:
                raise MeetingError(
                    f"step is due every local_steps = {steps} steps, after_step was called (or "
                    f"a step seen) {since} times since the last"
                )
            self._meet_where_due(last=True)
        else:
            self.meet(0)
        if self._copies is not None and stale.is_due(self._log.round + 1, self._copies.period):
            self.refresh_copies()
        self.end_round()

    def after_step(self) -> None:
        """With fragments or overlap: takes in and sends off what is due after a local step."""
        with self._log.meeting("a fragment's meeting"):
            self.land(self._steps.taken)
            self._meet_where_due(last=False)

    def finish(self) -> None:
        """Takes in all fragments that are under way; a collective."""
        with self._log.meeting("the last meeting"):
            self.land(None)

    def _meet_where_due(self, last: bool) -> None:
        """Meetings of this step: the last of a round are `hold_round`'s."""
        options = self._options
        assert options.local_steps is not None
        steps = wire.fragment_steps(options.fragments, options.local_steps)
        here = self._steps.taken % options.local_steps or options.local_steps
        if (here == options.local_steps) != last:
            return
        for fragment, due in enumerate(steps):
            if due == here:
                self.meet(fragment)

    def end_round(self) -> None:
        """A round is over."""
        self._log.round += 1
        self._steps.round_over(self._site.moe_layers)

    def refresh_copies(self) -> None:
        """Makes frozen copies of absent experts those of their holders; a collective."""
        if self._copies is not None:
            begun = time.perf_counter()
            self._log.sent(self._copies.refresh())
            self._log.exchange_s += time.perf_counter() - begun

    # -------------------------------------------------------------------------------- how it goes

    def meet(self, fragment: int) -> None:
        """The meeting of a fragment."""
        begun = time.perf_counter()
        meeting = self._begin(fragment)
        problem = meeting.check()
        self._log.sent(meeting.announce(problem))
        buckets = meeting.buckets()
        meeting.forget_tokens()
        self._log.sent(exchange(buckets, self._options.in_flight))  # encodes and applies each
        compared = meeting.agreement()
        compared.exchange()
        self._settle(compared)
        self._give_back(meeting)
        self._log.exchange_s += time.perf_counter() - begun

    def _begin(self, fragment: int) -> Meeting:
        return Meeting(self._state, self._counts, self._steps, self._log.round, fragment)

    def _give_back(self, meeting: Meeting) -> None:
        meeting.give_back()
        self._log.treatment = meeting.treatment

    def _settle(self, compared: Agreement) -> None:
        """Stops, or mends, where holders differ. All of a group do the same."""
        try:
            if compared.differs and self._options.on_mismatch == "heal":
                mend = self._background.submit(compared.heal)  # after what is under way
                self._log.healed += mend.result()
            compared.require()
            self._log.agreements += 1
        except MeetingError as error:
            self._log.broken = str(error)
            raise
        finally:
            self._log.sent(compared.bytes_sent)

    # ------------------------------------------------------------- what other drivers leave open

    @property
    def under_way(self) -> bool:
        """Whether a fragment is under way, or being compared."""
        return False

    def land(self, step: int | None) -> None:
        """Takes in the fragments that are due at a step; all of them, and compared, for None."""

    def compare(self) -> None:
        """After the meeting: verifies what it has left to be verified."""

    def settle(self, apply: bool) -> bool:
        """Ends the pending meeting: applies it, or makes everything as it was before.

        Returns whether there was one. Raises ValueError when something to be applied has not
        arrived.
        """
        return False
