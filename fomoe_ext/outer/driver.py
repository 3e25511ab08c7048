"""Driver: holds the meetings that are due; the site waits for each of them.

`flight.InFlight` goes on with local steps meanwhile, and in `staged.Staged` either all sites apply
a meeting or none does. Both take the same steps (`fomoe_ext.outer.meeting`) at other times.
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
    """With `staged`: a meeting that is neither committed nor rolled back.

    `errors`: vectors of error feedback, each with a copy of its values before the meeting.
    `arrived`: whether everything has arrived at this site.
    """

    meeting: Meeting
    buckets: list[Bucket]
    errors: list[tuple[Tensor, Tensor]]
    arrived: bool = False
    bytes_sent: int = 0


class Driver:
    """Holds every meeting without interruption, from the check of values to that of hashes.

    With `fragments` at several steps of a round, otherwise at its end. times: how many local steps
    are taken meanwhile, which are none here.
    """

    def __init__(
        self,
        state: OuterState,
        counts: TokenCounts,
        steps: StepCount,
        log: MeetingLog,
        copies: StaleCopies | None = None,
    ) -> None:
        """`copies`: the frozen copies of absent experts, refreshed after meetings."""
        self._state, self._counts, self._steps, self._log = state, counts, steps, log
        self._site, self._copies = state.layout.site, copies
        self._options = self._site.options
        self._background = Background()
        self.pending: Pending | None = None
        self.times = OverlapTimes(self._options)

    # ----------------------------------------------------------------------------- when it is due

    def hold_round(self) -> None:
        """The meeting at the end of a round. Raises MeetingError in the middle of one."""
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
        """Holds the meetings that are due at this step. `last`: called by `hold_round`, which holds
        those of a round's last step."""
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
        """Counts a completed round."""
        self._log.round += 1
        self._steps.round_over(self._site.moe_layers)

    def refresh_copies(self) -> None:
        """`OuterSync.refresh_copies`."""
        if self._copies is not None:
            begun = time.perf_counter()
            self._log.sent(self._copies.refresh())
            self._log.exchange_s += time.perf_counter() - begun

    # -------------------------------------------------------------------------------- one meeting

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
        self._require_agreement(compared)
        self._give_back(meeting)
        self._log.exchange_s += time.perf_counter() - begun

    def _begin(self, fragment: int) -> Meeting:
        return Meeting(self._state, self._counts, self._steps, self._log.round, fragment)

    def _give_back(self, meeting: Meeting) -> None:
        meeting.give_back()
        self._log.treatment = meeting.treatment

    def _require_agreement(self, compared: Agreement) -> None:
        """Where holders differ: heals, or raises MeetingError, by `on_mismatch`. All members of an
        owner group do the same."""
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

    # ----------------------------------------------------------------- what subclasses override

    @property
    def under_way(self) -> bool:
        """Whether a fragment is under way, or being compared."""
        return False

    def close(self, wait: bool) -> None:
        """Ends the thread and drops what has not ended; `wait`: for exchanges under way."""
        self._background.close(wait)
        self.pending = None

    def land(self, step: int | None) -> None:
        """Takes in the fragments that are due at a step. None: takes in all of them, and compares
        their hashes."""

    def compare(self) -> None:
        """After a meeting: compares hashes where `hold_round` has not done so."""

    def end_pending(self, commit: bool) -> bool:
        """Ends the pending meeting: commits it, or rolls everything back to what it was before.

        Returns whether there was one. Raises ValueError when it is to be committed and not all of
        it has arrived.
        """
        return False
