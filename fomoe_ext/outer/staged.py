"""A meeting in two phases: everything arrives everywhere, then everybody applies it, or nobody.

A site's death in the middle of an ordinary meeting leaves some sites with buckets applied that
others never got. Here nothing is applied before every site has told every other one that all of it
has arrived. Whoever has heard that from all applies; so if any site has applied, every site has
everything, and those left can apply as well, whatever happens next (`settle`). If none has, all go
back to what they were before and may meet again without the lost one.

It takes the memory of all payloads, where an ordinary meeting holds a few buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fomoe_ext.launch import inject
from fomoe_ext.outer.meeting import Meeting
from fomoe_ext.outer.options import MeetingError
from fomoe_ext.outer.reduce import Bucket, buckets_of, exchange

if TYPE_CHECKING:
    from fomoe_ext.outer.sync import OuterSync


class MeetingLost(MeetingError):
    """A meeting that broke off because a site is lost; nothing was applied, it can be held again.

    Call `settle` first.
    """


@dataclass
class Pending:
    """A meeting that has been encoded and is not yet applied.

    `errors`: the error feedback as it was before. `arrived`: whether all of it is here.
    """

    meeting: Meeting
    buckets: list[Bucket]
    errors: list[tuple[Tensor, Tensor]]
    arrived: bool = False
    bytes_sent: int = 0


@torch.no_grad()
def meet(sync: OuterSync) -> None:
    """The meeting of the whole model, up to and with its application; not yet compared.

    Raises MeetingError as `OuterSync.step`, with everything as it was, and what the transport
    raises when a site is lost: then `sync.pending` is to be settled.
    """
    meeting = Meeting(sync, 0)
    problem = meeting.problem()
    vectors = [v for f in sync.feedback for v in (f.own, f.shares) if v is not None]
    pending = Pending(meeting, [], [(vector, vector.clone()) for vector in vectors])
    sync.pending = pending
    try:
        pending.bytes_sent += meeting.announce(problem)
    except MeetingError:
        settle(sync, apply=False)
        raise
    pending.buckets = buckets_of(meeting.jobs(), sync.options.bucket_bytes)
    inject.point("encode")
    exchange(pending.buckets, sync.options.in_flight, apply=False)
    pending.bytes_sent += sum(bucket.bytes_sent for bucket in pending.buckets)
    pending.arrived = True
    inject.point("apply")
    everyone = sync.groups.group(sync.groups.everyone)
    _, sent = everyone.gather_now(torch.ones(1, dtype=torch.int64))  # wire.COMMIT_BYTES
    pending.bytes_sent += sent
    settle(sync, apply=True)


@torch.no_grad()
def settle(sync: OuterSync, apply: bool) -> bool:
    """Ends a pending meeting: applies it, or makes everything as it was before.

    Returns whether there was one. Raises ValueError when something to be applied has not arrived.
    """
    pending, sync.pending = sync.pending, None
    if pending is None:
        return False
    if apply and not pending.arrived:
        sync.pending = pending
        raise ValueError("apply: not all of the pending meeting has arrived at this site")
    if not apply:
        for vector, before in pending.errors:
            vector.copy_(before)
        sync.lost_bytes += pending.bytes_sent
        return True
    for bucket in pending.buckets:
        bucket.apply()
    pending.meeting.forget_tokens()
    pending.meeting.give_back()
    sync.sent(pending.bytes_sent)
    sync.compared = pending.meeting
    sync.count_round()
    return True
