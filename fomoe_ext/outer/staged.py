"""A meeting in two phases: everything arrives everywhere, then everybody applies it, or nobody.

A site's death in the middle of an ordinary meeting leaves some sites with buckets applied that
others never got. Here nothing is applied before every site has told every other one that all of it
has arrived. Whoever has heard that from all applies; so if any site has applied, every site has
everything, and those left can apply as well, whatever happens next (`settle`). If none has, all go
back to what they were before and may meet again without the lost one.

It takes the memory of all payloads, where an ordinary meeting holds a few buckets.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch

from fomoe_ext.launch import inject
from fomoe_ext.outer.driver import Driver, Pending
from fomoe_ext.outer.errors import MeetingError, MeetingLost
from fomoe_ext.outer.meeting import Meeting
from fomoe_ext.outer.reduce import exchange


class Staged(Driver):
    """With `staged`: the model meets as a whole, and nothing is applied that has not arrived
    everywhere."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._applied: Meeting | None = None
        """What was applied and has not been compared yet."""

    def hold_round(self) -> None:
        begun = time.perf_counter()
        self.meet(0)
        self._log.exchange_s += time.perf_counter() - begun

    @torch.no_grad()
    def meet(self, fragment: int) -> None:
        """The meeting, up to and with its application; not yet compared.

        Raises MeetingError as `OuterSync.step`, with everything as it was, and what the transport
        raises when a site is lost: then `settle` is to be called.
        """
        meeting = self._begin(fragment)
        problem = meeting.check()
        vectors = [v for f in self._state.feedback for v in (f.own, f.shares) if v is not None]
        pending = Pending(meeting, [], [(vector, vector.clone()) for vector in vectors])
        self.pending = pending
        try:
            pending.bytes_sent += meeting.announce(problem)
        except MeetingError:
            self.settle(apply=False)
            raise
        pending.buckets = meeting.buckets()
        inject.point("encode")
        exchange(pending.buckets, self._options.in_flight, apply=False)  # encodes each
        pending.bytes_sent += sum(bucket.bytes_sent for bucket in pending.buckets)
        pending.arrived = True
        inject.point("apply")
        # wire.COMMIT_BYTES
        _, sent = self._site.everyone.gather_now(torch.ones(1, dtype=torch.int64))
        pending.bytes_sent += sent
        self.settle(apply=True)
        self._applied = meeting

    @torch.no_grad()
    def settle(self, apply: bool) -> bool:
        pending, self.pending = self.pending, None
        if pending is None:
            return False
        if apply and not pending.arrived:
            self.pending = pending
            raise ValueError("apply: not all of the pending meeting has arrived at this site")
        if not apply:
            for vector, before in pending.errors:
                vector.copy_(before)
            self._log.lost_bytes += pending.bytes_sent
            return True
        for bucket in pending.buckets:
            bucket.apply()
        pending.meeting.forget_tokens()
        self._give_back(pending.meeting)
        self._log.sent(pending.bytes_sent)
        self.end_round()
        return True

    def compare(self) -> None:
        """Verifies what was applied; where a site is lost meanwhile the next meeting will tell."""
        applied, self._applied = self._applied, None
        if applied is None:
            return
        with suppress(MeetingLost), self._log.meeting("the comparison"):
            compared = applied.agreement()
            compared.exchange()
            self._settle(compared)
