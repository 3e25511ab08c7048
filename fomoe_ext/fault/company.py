"""When the sites of a job change: which are late, when to regroup, and the event for the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from fomoe_ext.fault import ownership
from fomoe_ext.fault.membership import NotAMember, TorchftMembership, View
from fomoe_ext.fault.reform import Reform, Regrouped
from fomoe_ext.fault.site import Recoverable
from fomoe_ext.launch.waiting import reason_of
from fomoe_ext.launch.world import PeerLost

_log = logging.getLogger(__name__)

LATE = "a site is late"
_ATTEMPTS = 12
"""Failed views in a row after which the job gives up."""
_LEAST_PATIENCE_S = 5.0
"""The least time that a live site is waited for: its first steps may be much slower than others."""
_LATE_S = 1.0
"""How long the other sites are waited for after one was late."""


class Company:
    """The sites that take part, as one of them sees them."""

    def __init__(self, membership: TorchftMembership, site: Recoverable) -> None:
        self.membership, self._site = membership, site
        self._fault = site.config.fault
        self._reform = Reform(site)
        self._until: float | None = None
        self._late = False

    # ------------------------------------------------------------------------------- who is late

    def lost(self) -> str:
        """Why a wait for the others is to be given up, or "" (the watch function of `waiting`)."""
        reason = self.membership.lost()
        if not reason and self._until is not None and time.monotonic() > self._until:
            self._late = True
            reason = LATE
            self.membership.end(reason)
        return reason

    @property
    def patience_s(self) -> float:
        """How long a live site is waited for, in seconds, from the measured time of a round."""
        site = self._site
        measured = self._fault.grace * site.step_s * site.config.run.local_steps
        return max(_LEAST_PATIENCE_S, measured + self._fault.silent_s)

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Inside, waits end after `patience_s`, and the late site counts as lost."""
        self._until = time.monotonic() + self.patience_s
        try:
            yield
        finally:
            self._until = None

    # -------------------------------------------------------------------------------- forming anew

    def join(self, view: View) -> dict[str, Any]:
        """Takes part in `view`, the first one of a site that joins late; returns the event."""
        return self._until_formed(view, "")

    def is_level(self) -> bool:
        """Whether every expert has enough holders and all sites hold about as many experts."""
        site = self._site
        return ownership.is_level(site.placement, site.config.sites.replication)

    def recover(self, reason: str) -> dict[str, Any]:
        """Regroups the remaining sites after one was lost; returns the event for log and report.

        Raises TooFew or PeerLost if the job cannot continue, Finished if it has ended.
        """
        return self._until_formed(None, reason)

    def renew(self) -> dict[str, Any]:
        """Takes in sites that asked to join and balances the experts; called between two rounds."""
        return self._until_formed(None, "", between_rounds=True)

    def _until_formed(
        self, view: View | None, reason: str, between_rounds: bool = False
    ) -> dict[str, Any]:
        site, start = self._site, time.perf_counter()
        before = site.world.members
        site.checkpoints.abandon()
        for _ in range(_ATTEMPTS):
            try:
                if view is None:
                    view = self._next_view(between_rounds)
                formed = self._reform.regroup(view)
            except PeerLost as error:
                self.membership.end(str(error))
                view, reason = None, reason or str(error)
                continue
            return self._tell(formed, before, reason, time.perf_counter() - start)
        raise PeerLost(f"the sites could not regroup in {_ATTEMPTS} attempts: {reason}")

    def _next_view(self, between_rounds: bool) -> View:
        membership, site = self.membership, self._site
        late = self._late or membership.lost() == LATE
        self._late = False
        deadline = time.monotonic() + site.config.outer.timeout_s
        while True:
            try:
                if site.late:
                    return membership.knock(site.config.outer.timeout_s)
                return membership.agree(
                    site.round,
                    between_rounds=between_rounds,
                    patience_s=_LATE_S if late else self.patience_s,
                )
            except NotAMember as error:
                _log.warning("site %d: %s; it joins again", site.world.number, error)
                site.late = True
            except dist.DistError as error:
                # The lighthouse cannot be reached; the heartbeat thread reconnects when it can.
                if time.monotonic() > deadline:
                    raise PeerLost(
                        f"the lighthouse cannot be reached: {reason_of(error)}"
                    ) from error
                time.sleep(1.0)

    def _tell(
        self, formed: Regrouped, before: tuple[int, ...], reason: str, seconds: float
    ) -> dict[str, Any]:
        site, membership = self._site, self.membership
        site.tally.recovery_s += seconds
        site.tally.recovery_bytes += formed.bytes_sent
        event = {
            "round": site.round,
            "step": site.step,
            "members": list(formed.members),
            "lost": {s: membership.why(s) for s in sorted(set(before) - set(formed.members))},
            "joined": list(formed.joined),
            "reason": reason,
            "meeting": formed.meeting,
            "restored": [dict(entry) for entry in formed.restored],
            "replication": site.placement.replication,
            "seconds": round(seconds, 3),
        }
        site.story.append(event)
        return event
