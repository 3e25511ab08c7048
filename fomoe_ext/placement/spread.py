"""Which rank of a site holds which of the site's resident experts. Needs no torch.

The numbers of experts of two ranks differ by at most one, so that all need about the same memory.
Their load depends on the router, and all ranks wait for the one with the largest load. Given a
measured load, `spread_experts` puts heavily used experts on different ranks.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

Groups = tuple[tuple[int, ...], ...]


def chunk_sizes(count: int, ranks: int) -> list[int]:
    """Sizes of `ranks` parts of `count` items: they differ by at most one, larger parts first."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def spread_experts(
    experts: Sequence[int], ranks: int, load: Sequence[float] | None = None
) -> Groups:
    """For each rank the ids of the experts that it holds, ascending; deterministic.

    The numbers of experts of two ranks differ by at most one. Without a load, ranks get chunks of
    ascending ids. With a load, a search reduces the largest total load of any rank until no move
    and no swap of two experts reduces it further. It starts once from longest processing time first
    (Graham 1969, with a limit on experts per rank) and once from the chunks. The better result is
    returned, which is never worse than the chunks.

    Args:
        experts: ids, in any order.
        ranks: number of ranks.
        load: of all experts by id, such as slots or shares of slots, finite and at least 0.

    Raises ValueError or TypeError naming the argument.
    """
    ids = sorted(_indices("experts", experts))
    if len(set(ids)) < len(ids) or (ids and ids[0] < 0):
        raise ValueError(f"experts must be distinct and not negative, got {ids}")
    (ranks,) = _indices("ranks", [ranks])
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    chunks = _chunks(ids, ranks)
    if load is None:
        return chunks
    weights = _checked(load, ids)
    cuts = [_Cut(start, weights) for start in (chunks, _heaviest_first(ids, ranks, weights))]
    for cut in cuts:
        while cut.improve():
            pass
    best = min(cuts, key=lambda cut: sorted(cut.totals, reverse=True))
    return tuple(map(tuple, best.groups))


def imbalance(groups: Sequence[Sequence[int]], load: Sequence[float]) -> float:
    """The largest load of a rank divided by the mean of all ranks; 1 if even or if all loads are 0.

    groups: for each rank its experts. load: as in `spread_experts`, with the same errors.
    """
    if not groups:
        raise ValueError("groups must have at least one rank, got none")
    parts = [_indices("groups", group) for group in groups]
    weights = _checked(load, [expert for part in parts for expert in part])
    totals = [sum(weights[expert] for expert in part) for part in parts]
    return float(Fraction(max(totals) * len(totals), sum(totals))) if any(totals) else 1.0


def is_load(value: Any) -> bool:
    """Whether a value is a valid load of an expert: a finite number of at least 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= sys.float_info.max


# ---- checks --------------------------------------------------------------------------------------


def _indices(name: str, values: Iterable[Any]) -> list[int]:
    values = list(values)
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be ints, got {values!r}") from None


def _checked(load: Sequence[float], experts: Sequence[int]) -> list[int]:
    """The load as multiples of one unit: sums of ints do not depend on their order."""
    load = list(load)
    for expert, value in enumerate(load):
        if not is_load(value):
            raise ValueError(f"load[{expert}] must be a finite number of at least 0, got {value!r}")
    if experts and not 0 <= min(experts) <= max(experts) < len(load):
        raise ValueError(
            f"load must have a number for each expert up to {max(experts)}, got {len(load)} numbers"
        )
    exact = [Fraction(value) for value in load]
    unit = max((value.denominator for value in exact), default=1)  # all are powers of two
    return [int(value * unit) for value in exact]


# ---- the search ----------------------------------------------------------------------------------


def _chunks(ids: Sequence[int], ranks: int) -> Groups:
    groups, first = [], 0
    for size in chunk_sizes(len(ids), ranks):
        groups.append(tuple(ids[first : first + size]))
        first += size
    return tuple(groups)


def _heaviest_first(ids: Sequence[int], ranks: int, weights: Sequence[int]) -> Groups:
    groups: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    small, larger = divmod(len(ids), ranks)  # `larger` ranks may hold small + 1 experts
    for expert in sorted(ids, key=lambda e: (-weights[e], e)):
        full = small + (sum(len(group) > small for group in groups) < larger)
        open_ranks = [rank for rank in range(ranks) if len(groups[rank]) < full]
        rank = min(open_ranks, key=lambda r: (totals[r], len(groups[r]), r))
        groups[rank].append(expert)
        totals[rank] += weights[expert]
    return tuple(map(tuple, groups))


class _Cut:
    """The experts of each rank, ascending, and the total load of each rank."""

    def __init__(self, groups: Groups, weights: Sequence[int]) -> None:
        self.weights = weights
        self.groups = [sorted(group) for group in groups]
        self.totals = [sum(weights[expert] for expert in group) for group in groups]

    def improve(self) -> bool:
        """Applies the move or swap that reduces the largest load most; False if there is none."""
        rank = max(range(len(self.totals)), key=lambda r: (self.totals[r], -r))
        larger, out, into, other = min(self._swap(rank, r) for r in range(len(self.groups)))
        if larger >= self.totals[rank]:
            return False
        for here, there, expert in ((rank, other, out), (other, rank, into)):
            if expert >= 0:
                self.groups[here].remove(expert)
                self.groups[there] = sorted([*self.groups[there], expert])
                self.totals[here] -= self.weights[expert]
                self.totals[there] += self.weights[expert]
        return True

    def _swap(self, rank: int, other: int) -> tuple[int, int, int, int]:
        """The best move or swap between two ranks: (larger load of the two afterwards, expert that
        leaves `rank`, expert that comes, `other`). -1 = no expert comes, which is possible only if
        `rank` has one expert more.
        """
        mine, theirs = self.totals[rank], self.totals[other]
        coming = [(self.weights[expert], expert) for expert in self.groups[other]]
        if len(self.groups[rank]) > len(self.groups[other]):
            coming.append((0, -1))
        found = []
        for out in self.groups[rank]:
            for comes, into in coming:
                gain = self.weights[out] - comes
                found.append((max(mine - gain, theirs + gain), out, into, other))
        return min(found, default=(mine, -1, -1, other))
