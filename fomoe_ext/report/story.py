"""Describes in words which sites a job lost and which joined. Needs no torch.

An event is a dict with these keys:
    round, step: the last ones before the event.
    members: the sites that continue.
    lost: for each lost site, why.
    joined: the sites that joined.
    reason: why the sites met anew if none was lost.
    meeting: what became of an interrupted meeting, such as "rolled back".
    restored: experts whose holders were all lost; "from_step" is the local step of the state from
        which each was restored, None = it starts again from its initial values.
    seconds: until training continued.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def describe(event: Mapping[str, Any]) -> str:
    """What happened, in a line."""
    return (
        f"after round {event['round']}: {what(event)}; continues with {_sites(event['members'])} "
        f"after {event['seconds']:.1f} s"
    )


def what(event: Mapping[str, Any]) -> str:
    """What happened, without its round and duration."""
    words = [f"site {site} lost, {why}" for site, why in event["lost"].items()]
    if event["joined"]:
        words.append(f"{_sites(event['joined'])} joined")
    if not words:
        words.append(_brief(event["reason"]) or "experts divided evenly among the sites")
    words += _restored(event)
    if event["meeting"]:
        words.append(f"the meeting was {event['meeting']}")
    return "; ".join(words)


def _restored(event: Mapping[str, Any]) -> list[str]:
    """What became of experts whose holders were all lost."""
    steps = [entry.get("from_step") for entry in event["restored"]]
    lost = [event["step"] - step for step in steps if step is not None]
    words = []
    if lost:
        words.append(
            f"{len(lost)} experts without a holder were restored from at most {max(lost)} local "
            "steps before"
        )
    if len(lost) < len(steps):
        words.append(
            f"{len(steps) - len(lost)} experts without a holder start from initial values: there "
            "is no checkpoint"
        )
    return words


def _brief(reason: str) -> str:
    """The informative part of an error's text."""
    text = re.sub(r"\[/[^\]]*\] ", "", reason)
    return text.partition(". This is typically")[0][:200]


def _sites(numbers: Sequence[int]) -> str:
    return f"{'site' if len(numbers) == 1 else 'sites'} {', '.join(map(str, numbers))}"
