"""What meetings fail with."""

from __future__ import annotations


class MeetingError(RuntimeError):
    """A meeting that did not come about, or broke off."""


class MeetingLost(MeetingError):
    """With `staged`: a meeting that broke off because a site is lost; nothing was applied, it can
    be held again.

    Call `OuterSync.settle` first.
    """
