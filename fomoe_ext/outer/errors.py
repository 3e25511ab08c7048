"""The exceptions that meetings raise."""

from __future__ import annotations


class MeetingError(RuntimeError):
    """A meeting could not be held, or broke off."""


class MeetingLost(MeetingError):
    """With `staged`: a meeting that broke off because a site is lost. This site has changed no
    parameter. Call `OuterSync.end_pending`; after a rollback the meeting can be held again."""
