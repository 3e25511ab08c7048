"""Which site holds which expert after sites were lost or joined, with few moves. Needs no torch.

The rule, layer by layer: a present site keeps its experts. Experts without or with too few holders
go to the sites with the fewest experts. Then experts move from the fullest site to the emptiest
until the counts of any two sites differ by at most one. Ties go to the lower site number, so that
all sites compute the same table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fomoe_ext.placement.placement import Placement

Holdings = Sequence[Sequence[Sequence[int]]]
"""[site][layer] -> the experts that the site holds."""
NOBODY: Mapping[tuple[int, int], int] = MappingProxyType({})
Table = list[list[list[int]]]
"""[layer][expert] -> the sites that hold it, ascending."""


def table_of(holdings: Holdings, num_experts: int) -> Table:
    """The holders of every expert; an empty list if it has none."""
    layers = len(holdings[0])
    table: Table = [[[] for _ in range(num_experts)] for _ in range(layers)]
    for site, of_layers in enumerate(holdings):
        for layer, experts in enumerate(of_layers):
            for expert in experts:
                table[layer][expert].append(site)
    return table


def orphans(holdings: Holdings, num_experts: int) -> list[tuple[int, int]]:
    """The experts without a holder, as (layer, expert)."""
    table = table_of(holdings, num_experts)
    return [
        (layer, expert)
        for layer, experts in enumerate(table)
        for expert, owners in enumerate(experts)
        if not owners
    ]


def adopt_orphans(
    holdings: Holdings, num_experts: int, prefer: Mapping[tuple[int, int], int] = NOBODY
) -> Placement:
    """The placement in which every expert stays where it is, and experts without a holder get one.

    `prefer`: by (layer, expert), the site that becomes the holder because it has a shadow copy.
    """
    table = table_of(holdings, num_experts)
    _adopt(table, len(holdings), prefer)
    return Placement.uneven(table, len(holdings))


def rebalance(holdings: Holdings, num_experts: int, replication: int) -> Placement:
    """The placement with every expert on min(replication, sites) sites and balanced counts.

    Raises ValueError for an expert without a holder: call `adopt_orphans` first.
    """
    sites = len(holdings)
    wanted = min(replication, sites)
    table = table_of(holdings, num_experts)
    if orphans(holdings, num_experts):
        raise ValueError(
            f"holdings must contain all experts, got none for {orphans(holdings, num_experts)}"
        )
    for experts in table:
        loads = _loads(experts, sites)
        for owners in experts:
            while len(owners) > wanted:
                fullest = max(owners, key=lambda site: (loads[site], site))
                owners.remove(fullest)
                loads[fullest] -= 1
        for owners in experts:
            while len(owners) < wanted:
                _add(owners, loads)
        _level(experts, loads)
    return Placement.uneven(table, sites)


def _adopt(table: Table, sites: int, prefer: Mapping[tuple[int, int], int]) -> None:
    for layer, experts in enumerate(table):
        loads = _loads(experts, sites)
        for expert, owners in enumerate(experts):
            if owners:
                continue
            if (layer, expert) in prefer:
                owners.append(prefer[layer, expert])
                loads[owners[0]] += 1
            else:
                _add(owners, loads)


def _loads(experts: Sequence[Sequence[int]], sites: int) -> list[int]:
    loads = [0] * sites
    for owners in experts:
        for site in owners:
            loads[site] += 1
    return loads


def _add(owners: list[int], loads: list[int]) -> None:
    site = min((s for s in range(len(loads)) if s not in owners), key=lambda s: (loads[s], s))
    owners.append(site)
    owners.sort()
    loads[site] += 1


def _level(experts: Sequence[list[int]], loads: list[int]) -> None:
    """Moves experts from full to empty sites. Each move evens out the counts, so the loop ends."""
    while True:
        pairs = sorted(
            ((loads[a] - loads[b], -b, a) for a in range(len(loads)) for b in range(len(loads))),
            reverse=True,
        )
        for gain, negative, source in pairs:
            target = -negative
            if gain < 2:
                return
            movable = [o for o in experts if source in o and target not in o]
            if movable:
                # Take from the owner set with the most experts, where one fewer matters least.
                chosen = max(movable, key=lambda o: sum(other == o for other in experts))
                chosen.remove(source)
                chosen.append(target)
                chosen.sort()
                loads[source] -= 1
                loads[target] += 1
                break
        else:
            return


def is_level(placement: Placement, replication: int) -> bool:
    """Whether every expert has min(replication, sites) holders and the expert counts of any two
    sites differ by at most one in each layer."""
    wanted = min(replication, placement.num_sites)
    for experts in placement.table:
        loads = _loads(experts, placement.num_sites)
        if max(loads) - min(loads) > 1 or any(len(owners) != wanted for owners in experts):
            return False
    return True
