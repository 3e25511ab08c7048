"""What happened to the sites of a job, in words. Needs no torch.

An event is a dict: round and step after which it was; the members that go on; "lost", by site why;
"joined"; "reason", where nobody was lost; "meeting", what became of one that broke off; "restored",
experts that nobody held any more, with "from_step", the local step that their state is of (None:
they begin anew); seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def describe(event: Mapping[str, Any]) -> str:
    """What happened, in a line."""
    return (
        f"after round {event['round']}: {what(event)}; goes on with {_sites(event['members'])} "
        f"after {event['seconds']:.1f} s"
    )


def what(event: Mapping[str, Any]) -> str:
    """What happened, without when and how long it took."""
    words = [f"site {site} lost, {why}" for site, why in event["lost"].items()]
    if event["joined"]:
        words.append(f"{_sites(event['joined'])} joined")
    if not words:
        words.append(_brief(event["reason"]) or "experts shared out evenly")
    words += _restored(event)
    if event["meeting"]:
        words.append(f"the meeting was {event['meeting']}")
    return "; ".join(words)


def _restored(event: Mapping[str, Any]) -> list[str]:
    """What has become of experts that nobody held any more."""
    steps = [entry.get("from_step") for entry in event["restored"]]
    lost = [event["step"] - step for step in steps if step is not None]
    words = []
    if lost:
        words.append(
            f"{len(lost)} experts without a holder are back as they were at most {max(lost)} local "
            "steps ago"
        )
    if len(lost) < len(steps):
        words.append(
            f"{len(steps) - len(lost)} experts without a holder begin anew: there is no checkpoint"
        )
    return words


def _brief(reason: str) -> str:
    """The part of an error's text that tells a reader something."""
    text = re.sub(r"\[/[^\]]*\] ", "", reason)
    return text.partition(". This is typically")[0][:200]


def _sites(numbers: Sequence[int]) -> str:
    return f"{'site' if len(numbers) == 1 else 'sites'} {', '.join(map(str, numbers))}"
