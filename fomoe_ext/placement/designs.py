"""Cyclic and random tables [layer][expert] -> sites, which depend only on sizes and a seed.

In the cyclic table any two sites share about the same number of experts. It is a cyclic design: the
owner sets of a layer are shifts of a few base blocks. The random table is that of the FoMoE paper
(arXiv 2606.19025, Algorithm 1).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import combinations
from math import gcd

Row = tuple[tuple[int, ...], ...]
"""One layer: for each expert the sites that hold it, ascending."""

_LAYER_WEIGHT = 1000
"""Weight of evenness within a layer, relative to evenness over all layers."""
_MOST_WORK = 100_000
"""Limit for the work of finding switches; large tables are about even without them."""
_SWITCHES_PER_EDGE = 10


def check_sizes(
    num_sites: int, num_experts: int, num_layers: int, replication: int, even: bool = True
) -> None:
    """ValueError for sizes for which no placement exists; the message names possible ones."""
    sizes = {
        "num_sites": num_sites,
        "num_experts": num_experts,
        "num_layers": num_layers,
        "replication": replication,
    }
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if replication > num_sites:
        raise ValueError(f"replication must be in [1, num_sites = {num_sites}], got {replication}")
    if even and num_experts * replication % num_sites:
        unit = num_sites // gcd(num_sites, replication)
        least = num_sites // gcd(num_sites, num_experts)
        works = range(least, num_sites + 1, least)
        below, above = num_experts // unit * unit, -(-num_experts // unit) * unit
        experts = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"num_experts * replication must be a multiple of num_sites, so that every site holds "
            f"the same number, got {num_experts} * {replication} with {num_sites} sites. "
            f"Possible: replication {', '.join(map(str, works))} with {num_experts} experts, or "
            f"{experts} experts with replication {replication}"
        )


# --------------------------------------------------------------------------------------- cyclic


def cyclic_table(
    num_sites: int, num_experts: int, num_layers: int, replication: int
) -> tuple[Row, ...]:
    """The table of `Placement.cyclic`; equal layers are one object.

    Each expert takes the next sites of the cycle 0, 1, .. N-1, 0, ..; layer l begins at site l.
    Then switches even out how many experts each pair of sites shares, in the layer and over all
    layers. Raises ValueError for impossible sizes.
    """
    check_sizes(num_sites, num_experts, num_layers, replication)
    designs = _even_designs(num_sites, num_experts, min(num_layers, num_sites), replication)
    rows: dict[tuple[int, int], Row] = {}
    table = []
    for layer in range(num_layers):
        cycle, design = divmod(layer, len(designs))
        key = cycle % num_sites, design
        if key not in rows:
            rows[key] = tuple(
                tuple(sorted((site + cycle) % num_sites for site in owners))
                for owners in designs[design]
            )
        table.append(rows[key])
    return tuple(table)


def _even_designs(
    num_sites: int, num_experts: int, num_designs: int, replication: int
) -> list[Row]:
    """Owner sets of all experts for `num_designs` layers; each layer evens out those before it."""
    total = [[0] * num_sites for _ in range(num_sites)]
    designs = []
    for shift in range(num_designs):
        # Chunks of the cycle 0, 1, .. N-1, 0, ..: every site as often as any other.
        owners = [
            {(expert * replication + i + shift) % num_sites for i in range(replication)}
            for expert in range(num_experts)
        ]
        if 1 < replication < num_sites:  # else no switch makes it more even
            _even_out(owners, total)
        designs.append(tuple(tuple(sorted(sites)) for sites in owners))
    return designs


def _even_out(owners: list[set[int]], total: list[list[int]]) -> None:
    """Switches sites between experts as long as that makes the pair counts more even.

    In a switch, expert a gives site s to expert b and gets site t, so that no site holds more or
    fewer experts. Every switch reduces the sum of squared pair counts of this layer and, with
    `_LAYER_WEIGHT` times less weight, of all layers so far (`total`). At the end the counts of this
    layer are added to `total`.
    """
    sites, weight = range(len(total)), _LAYER_WEIGHT + 1
    # For each pair of sites, half of what the sum gains if the two share one more expert.
    cost = [list(row) for row in total]
    for holders in owners:
        for s in holders:
            for t in holders:
                cost[s][t] += weight
    names = [tuple(sorted(holders)) for holders in owners]
    exhausted: dict[Row, int] = {}  # pairs without an improving switch, and their work
    work, improved = 0, True
    while improved:
        improved = False
        for first, second in combinations(range(len(owners)), 2):
            pair = names[first], names[second]
            a, b = owners[first], owners[second]
            effort = exhausted.get(pair)
            known = effort is not None
            if effort is None:
                effort = 2 * len(a - b) ** 3
            work += effort
            if work > _MOST_WORK:
                improved = False
                break
            if known:
                continue
            only_a, only_b = sorted(a - b), sorted(b - a)
            switch = _best_switch(cost, only_a, only_b)
            if switch is None:
                exhausted[pair] = effort
                continue
            improved = True
            exhausted.clear()
            _count_switch(cost, only_a, only_b, switch)
            a.symmetric_difference_update(switch)
            b.symmetric_difference_update(switch)
            names[first], names[second] = tuple(sorted(a)), tuple(sorted(b))
    for s in sites:
        for t in sites:
            total[s][t] += (cost[s][t] - total[s][t]) // weight


def _best_switch(
    cost: Sequence[Sequence[int]], only_a: Sequence[int], only_b: Sequence[int]
) -> tuple[int, int] | None:
    """The best sites of a and b to switch; None if no switch reduces the sum."""

    def gains(sites: Sequence[int], others: Sequence[int]) -> list[int]:
        # After the switch, s shares an expert with the sites of b, not a; t the reverse.
        found = []
        for site in sites:
            row = cost[site]
            gain = -row[site]
            for partner in sites:
                gain += row[partner]
            for partner in others:
                gain -= row[partner]
            found.append(gain)
        return found

    leaving, joining = gains(only_a, only_b), gains(only_b, only_a)
    least = 2 * (_LAYER_WEIGHT + 1) * (len(only_a) - 1)
    best, switch = 0, None
    for s, of_s in zip(only_a, leaving, strict=True):
        for t, of_t in zip(only_b, joining, strict=True):
            gain = of_s + of_t + 2 * cost[s][t] - least
            if gain > best:
                best, switch = gain, (s, t)
    return switch


def _count_switch(
    cost: list[list[int]], only_a: Sequence[int], only_b: Sequence[int], switch: tuple[int, int]
) -> None:
    s, t = switch
    for gets, loses, partners in ((t, s, only_a), (s, t, only_b)):
        for x in partners:
            if x == loses:
                continue
            for site, step in ((gets, _LAYER_WEIGHT + 1), (loses, -_LAYER_WEIGHT - 1)):
                cost[site][x] += step
                cost[x][site] += step


# --------------------------------------------------------------------------------------- random


def random_table(table: Sequence[Row], seed: int, epoch: int) -> tuple[Row, ...]:
    """The table of `Placement.random`, from the cyclic table of these sizes.

    The experts of each layer are shuffled, then ten random switches per (expert, site) pair are
    tried (a Markov chain whose stationary distribution is uniform).
    """
    drawn = []
    for layer, experts in enumerate(table):
        name = repr(("placement", seed, epoch, layer)).encode()
        number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        drawn.append(_switched(experts, random.Random(number)))
    return tuple(drawn)


def _switched(experts: Row, generator: random.Random) -> Row:
    """The owner sets after random switches, in which two experts exchange one holder each.

    It uses only `generator.random()`, which gives the same numbers in all versions of Python.
    """

    def below(bound: int) -> int:
        return int(generator.random() * bound)

    order = list(experts)
    for last in range(len(order) - 1, 0, -1):
        other = below(last + 1)
        order[last], order[other] = order[other], order[last]
    table = [list(owners) for owners in order]
    replication = len(table[0])
    for _ in range(_SWITCHES_PER_EDGE * len(table) * replication):
        first, second = table[below(len(table))], table[below(len(table))]
        i, j = below(replication), below(replication)
        if first[i] not in second and second[j] not in first:
            first[i], second[j] = second[j], first[i]
    return tuple(tuple(sorted(owners)) for owners in table)
