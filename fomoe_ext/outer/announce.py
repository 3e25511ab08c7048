"""Announcing a meeting: all sites hear of a problem at any of them before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from torch import Tensor

from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.groups import share_statuses
from fomoe_ext.outer.layout import Layout, Piece
from fomoe_ext.outer.site import Site
from fomoe_ext.placement.placement import Placement


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. (The sum is a quick test, but it can overflow.)"""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def bad_tensor(
    layouts: Sequence[Layout], what: str, tensor_of: Callable[[Piece], Tensor | None]
) -> str:
    """A message that names the first piece with NaN or infinite values, or an empty string."""
    good: set[int] = set()
    for layout in layouts:
        for piece in layout.pieces:
            tensor = tensor_of(piece)
            if tensor is None or id(piece.tensor) in good:
                continue
            if is_finite(tensor):
                good.add(id(piece.tensor))
            elif not is_finite(piece.part_of(tensor)):
                return f"{what} of {piece.key} is NaN or infinite"
    return ""


def meeting_name(placement: Placement, completed: int, fragment: int = 0) -> str:
    """Identifies a meeting by its round, its fragment and a hash of the placement."""
    digest = hashlib.blake2b(repr(placement.table).encode(), digest_size=4).hexdigest()
    return f"{completed + 1}.{fragment} {digest}"


def require_good(site: Site, name: str, problem: str) -> int:
    """Raises MeetingError at all sites when one has a problem, or is in another meeting.

    Nothing has been changed then. `name`: from `meeting_name`. Returns the bytes sent.
    """
    group, ranks = site.everyone, site.ranks
    problem = ranks.first(problem, "background")
    texts, sent = ranks.tell(lambda: share_statuses(group, f"{name} {problem}"), "background")
    if problem:
        texts[site.index] = f"{name} {problem}"  # all of it: what travels may be cut short
    number, placement = name.split()
    problems = []
    for other, text in enumerate(texts):
        meeting, theirs, words = [*text.split(" ", 2), "", ""][:3]
        if words:
            problems.append(f"site {other}: {words}")
        elif f"{meeting} {theirs}" != name:
            what = "has another placement" if theirs != placement else f"is in meeting {meeting}"
            problems.append(f"site {other} {what}, site {site.index} is in meeting {number}")
    if problems:
        raise MeetingError(f"nothing was sent or changed: {'; '.join(problems)}")
    return sent if ranks.leads else 0
