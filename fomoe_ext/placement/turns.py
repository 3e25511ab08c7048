"""Experts in turns: which of an owner group's experts travel in which meeting. Needs no torch.

With `expert_turns` = P, P meetings form a cycle in which each expert is averaged once. Dense
parameters are averaged in every meeting. So sites can meet P times as often with the same bytes for
experts. Between the meetings of an expert each holder trains its own version of it, and the anchor
does not change.

`turn_order` is the order in a cycle. "least-trained" begins with the experts to which their holders
routed the fewest tokens per round since their last meeting, since these may gain most from other
sites. "most-trained" begins with those that got the most tokens, since they have changed most.
"numbered" goes by layer and number. In docs/claims.md all three reach the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fomoe_ext.checks import at_least, one_of

ORDERS = ("least-trained", "most-trained", "numbered")
"""Values of turn_order."""

Expert = tuple[int, int]
"""Layer and number."""


class GroupExperts(NamedTuple):
    """The experts of an owner group: their number, and the elements that travel for each."""

    count: int
    elements: int


def check_turns(expert_turns: int, turn_order: str, optimizer: str, staggered: bool) -> None:
    """ValueError or TypeError, naming the argument, unless these turns are possible."""
    at_least(1, expert_turns=expert_turns)
    one_of(ORDERS, turn_order=turn_order)
    if expert_turns > 1 and (staggered or optimizer not in ("diloco", "fedavg")):
        raise ValueError(
            "expert_turns > 1 needs optimizer diloco or fedavg, fragments = 1 and overlap = 0"
        )


def counts_tokens(expert_mean: str, expert_turns: int, turn_order: str) -> bool:
    """Whether sites exchange how many tokens they routed to each expert: to weight means, or to
    order the experts."""
    return expert_mean == "tokens" or (expert_turns > 1 and turn_order != "numbered")


def turn_size(count: int, turns: int, round_index: int) -> int:
    """Number of a group's `count` experts that meet in a round; rounds count from 1. The numbers in
    a cycle differ by at most one and add up to `count`."""
    turn = (round_index - 1) % turns
    return (turn + 1) * count // turns - turn * count // turns


def waiting_elements(experts: GroupExperts, turns: int, round_index: int) -> int:
    """Elements of a group's experts that do not travel in a round."""
    return (experts.count - turn_size(experts.count, turns, round_index)) * experts.elements


def experts_of_turn(
    experts: Iterable[Expert],
    round_index: int,
    turns: int,
    order: str,
    met: Callable[[Expert], int],
    trained: Callable[[Expert], float],
) -> list[Expert]:
    """The experts of one owner group that meet in a round, in ascending order.

    met: the round in which an expert was last averaged, 0 = never. trained: tokens that its holders
    have routed to it since. All holders must pass the same values.
    """
    begun = (round_index - 1) // turns * turns  # the last round before this cycle
    sign = {"least-trained": 1, "most-trained": -1, "numbered": 0}[order]

    def rank(expert: Expert) -> Sequence[float]:
        rate = trained(expert) / (round_index - met(expert)) if sign else 0.0
        return (met(expert) > begun, sign * rate, *expert)

    ranked = sorted(experts, key=rank)
    return sorted(ranked[: turn_size(len(ranked), turns, round_index)])
