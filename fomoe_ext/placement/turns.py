"""Experts in turns: which of an owner group's experts travel in which meeting. Needs no torch.

With `expert_turns` = P every P meetings are a cycle, in which each expert meets once; what is dense
meets every time. So sites can meet P times as often for the same bytes of experts. Which expert
goes first in a cycle is `turn_order`: "least-trained" those to which their holders have routed the
fewest tokens per round since they last met, which may gain most from what others have learned;
"most-trained" those with the most, which have moved furthest; "numbered" by layer and number. In
docs/claims.md they end alike. Between its meetings an expert goes on as each holder trains it, and
its anchor stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fomoe_ext.checks import at_least, one_of

ORDERS = ("least-trained", "most-trained", "numbered")
"""Which experts meet first in a cycle."""

Expert = tuple[int, int]
"""Layer and number."""


class GroupExperts(NamedTuple):
    """The experts of an owner group: how many, and elements of each that travel with it."""

    count: int
    elements: int


def check_turns(expert_turns: int, turn_order: str, optimizer: str, staggered: bool) -> None:
    """ValueError or TypeError, naming the argument, unless experts can meet in such turns."""
    at_least(1, expert_turns=expert_turns)
    one_of(ORDERS, turn_order=turn_order)
    if expert_turns > 1 and (staggered or optimizer not in ("diloco", "fedavg")):
        raise ValueError(
            "expert_turns > 1 needs optimizer diloco or fedavg, fragments = 1 and overlap = 0"
        )


def counts_tokens(expert_mean: str, expert_turns: int, turn_order: str) -> bool:
    """Whether sites tell each other how many tokens they routed to each expert: to weigh their
    values, or to order the experts."""
    return expert_mean == "tokens" or (expert_turns > 1 and turn_order != "numbered")


def turn_size(count: int, turns: int, round_index: int) -> int:
    """How many of a group's `count` experts meet in a round, counted from 1: of a cycle's rounds
    each has as many, or one more, and all together `count`."""
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

    `met`: the round in which an expert last met, 0 = never. `trained`: tokens that its holders have
    routed to it since. Every holder must pass the same.
    """
    begun = (round_index - 1) // turns * turns  # the last round before this cycle
    sign = {"least-trained": 1, "most-trained": -1, "numbered": 0}[order]

    def rank(expert: Expert) -> Sequence[float]:
        rate = trained(expert) / (round_index - met(expert)) if sign else 0.0
        return (met(expert) > begun, sign * rate, *expert)

    ranked = sorted(experts, key=rank)
    return sorted(ranked[: turn_size(len(ranked), turns, round_index)])
