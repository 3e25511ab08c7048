"""Placement: which site holds which expert, layer by layer. Plain Python, no torch.

Every expert is on exactly `replication` sites and every site holds the same number of experts of
each layer, so that all sites need the same memory and work. `cyclic` is fixed and spreads the
owner sets so that any two sites share about the same number of experts (a cyclic design: the owner
sets of a layer are the shifts of few base blocks). `random` draws a new table per epoch, as the
FoMoE paper (arXiv 2606.19025, Algorithm 1) does for its random placement.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import gcd
from typing import Any, NamedTuple

from fomoe_ext.checks import a_bool

Owners = tuple[int, ...]
"""The sites that hold an expert, ascending."""

_LAYER_WEIGHT = 1000
"""Evenness within a layer counts so much more than evenness over all layers."""
_MOST_WORK = 100_000
_SWITCHES_PER_EDGE = 10


class Transfer(NamedTuple):
    """Expert `expert` of layer `layer` is sent by site `source` to site `target`."""

    layer: int
    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class Placement:
    """Who holds what: `owners_of[layer][expert]` is the ascending tuple of the holders' numbers.

    Raises ValueError when the table is not of these sizes, an expert is not on exactly
    `replication` sites, or a site holds more experts of a layer than another.
    """

    num_sites: int
    num_experts: int
    num_layers: int
    replication: int
    owners_of: tuple[tuple[Owners, ...], ...]
    even: bool = True
    """False: an expert may be on fewer than `replication` sites, and sites may hold different
    numbers of experts, as after a site's death."""

    def __post_init__(self) -> None:
        a_bool(even=self.even)
        sizes = self.num_sites, self.num_experts, self.num_layers, self.replication
        _check_sizes(*sizes, even=self.even)
        if len(self.owners_of) != self.num_layers:
            raise ValueError(
                f"owners_of must have num_layers = {self.num_layers} layers, got "
                f"{len(self.owners_of)}"
            )
        residents: dict[int, tuple[tuple[int, ...], ...]] = {}
        for layer, experts in enumerate(self.owners_of):
            if id(experts) in residents:  # layers of a cyclic placement are few different ones
                continue
            self._check_layer(layer, experts)
            held: list[list[int]] = [[] for _ in range(self.num_sites)]
            for expert, owners in enumerate(experts):
                for site in owners:
                    held[site].append(expert)
            residents[id(experts)] = tuple(map(tuple, held))
        of_layers = tuple(residents[id(experts)] for experts in self.owners_of)
        object.__setattr__(self, "_residents", of_layers)
        object.__setattr__(self, "_owner_counts", {})

    def _check_layer(self, layer: int, experts: Sequence[Owners]) -> None:
        if len(experts) != self.num_experts:
            raise ValueError(
                f"owners_of[{layer}] must have num_experts = {self.num_experts} entries, got "
                f"{len(experts)}"
            )
        good: set[Owners] = set()
        for expert, owners in enumerate(experts):
            if isinstance(owners, tuple) and owners in good:
                continue
            where = f"owners_of[{layer}][{expert}]"
            if not isinstance(owners, tuple) or not all(type(s) is int for s in owners):
                raise ValueError(f"{where} must be a tuple of site numbers, got {owners!r}")
            if any(not 0 <= s < self.num_sites for s in owners):
                raise ValueError(f"{where} must be sites in [0, {self.num_sites}), got {owners}")
            if list(owners) != sorted(set(owners)):
                raise ValueError(f"{where} must be ascending and without repeats, got {owners}")
            if len(owners) != self.replication and (self.even or not owners):
                raise ValueError(
                    f"{where} must name replication = {self.replication} sites, got {owners}"
                )
            good.add(owners)
        if not self.even:
            return
        counts = Counter(chain.from_iterable(experts))
        held = [counts[site] for site in range(self.num_sites)]
        if len(set(held)) > 1:
            raise ValueError(
                f"every site must hold {self.experts_per_site} experts of layer {layer}, sites "
                f"0..{self.num_sites - 1} hold {held}"
            )

    # -------------------------------------------------------------------------------- makers

    @classmethod
    def cyclic(
        cls, num_sites: int, num_experts: int, num_layers: int, replication: int
    ) -> Placement:
        """The fixed, evenly spread placement; depends on nothing but these sizes.

        The experts take their sites in turn from the cycle 0, 1, .. N-1, 0, .., layer l beginning
        at site l; then switches even out how many experts each pair of sites shares, in the layer
        and over all layers. Raises ValueError for impossible sizes.
        """
        _check_sizes(num_sites, num_experts, num_layers, replication)
        designs = _even_designs(num_sites, num_experts, min(num_layers, num_sites), replication)
        rows: dict[tuple[int, int], tuple[Owners, ...]] = {}
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
        return cls(num_sites, num_experts, num_layers, replication, tuple(table))

    @classmethod
    def random(
        cls,
        num_sites: int,
        num_experts: int,
        num_layers: int,
        replication: int,
        *,
        seed: int,
        epoch: int = 0,
    ) -> Placement:
        """A placement drawn from (seed, epoch), the same one on every site and machine.

        Drawn near uniformly among all placements of these sizes: the cyclic one with its experts
        shuffled, then ten random switches per (expert, site) pair (a Markov chain whose stationary
        distribution is uniform). Raises ValueError for impossible sizes.
        """
        start = cls.cyclic(num_sites, num_experts, num_layers, replication)
        table = []
        for layer, experts in enumerate(start.owners_of):
            name = repr(("placement", seed, epoch, layer)).encode()
            number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
            table.append(_switched(experts, random.Random(number)))
        return cls(num_sites, num_experts, num_layers, replication, tuple(table))

    @classmethod
    def from_coactivation(
        cls, counts: Any, num_sites: int, replication: int, *, together: bool = True
    ) -> Placement:
        """A placement by how often the same token has chosen two experts.

        Large (`together`) or small (else) is made, in every layer, the sum over sites of the counts
        of all pairs of experts that a site holds. What a token finds of its experts on a site is on
        average the same in every placement of these sizes; with experts of a token together it
        finds all of them or none more often, with them apart some of them. Loads are not evened
        out: a site may hold hotter experts than another. A local optimum, by a greedy start and
        swaps, the same on every machine, and never worse than the cyclic placement.

        Args:
            counts: ints [L, E, E] by layer, not negative and symmetric, as nested lists, array or
                tensor; what is on the diagonal does not matter. `fomoe_ext.placement.coactivation`
                reads those of a run.
            num_sites, replication: as of the other placements.
            together: on the same sites, or apart.

        Raises ValueError or TypeError naming the argument, for impossible sizes too.
        """
        from fomoe_ext.placement.coactivation import checked_counts, search

        a_bool(together=together)
        table = checked_counts(counts)
        num_layers, num_experts = table.shape[:2]
        start = cls.cyclic(num_sites, num_experts, num_layers, replication)
        return cls.from_table(search(table, start, together), num_sites)

    @classmethod
    def from_table(
        cls, table: Sequence[Sequence[Sequence[int]]], num_sites: int | None = None
    ) -> Placement:
        """A given table [layer][expert] -> sites, in any order; `num_sites` None = the largest + 1.

        Replication is read off the table. Raises ValueError when it is no valid placement.
        """
        try:
            rows = tuple(tuple(tuple(sorted(sites)) for sites in experts) for experts in table)
        except TypeError as error:
            raise ValueError(f"table must be [layer][expert] -> list of sites: {error}") from None
        if not rows or not rows[0] or not rows[0][0]:
            raise ValueError("table must have a layer, an expert and a site at least")
        held = chain.from_iterable(chain.from_iterable(rows))
        largest = 0
        for site in held:
            if not isinstance(site, int):
                raise ValueError(f"table must hold site numbers, got {site!r}")
            largest = max(largest, site)
        sites = largest + 1 if num_sites is None else num_sites
        return cls(sites, len(rows[0]), len(rows), len(rows[0][0]), rows)

    @classmethod
    def uneven(cls, table: Sequence[Sequence[Sequence[int]]], num_sites: int) -> Placement:
        """A given table [layer][expert] -> sites in which sites may hold different numbers.

        `replication` is the largest number of holders. An even table gives an even placement.
        Raises ValueError when an expert has no holder or sites are not in [0, num_sites).
        """
        try:
            rows = tuple(tuple(tuple(sorted(sites)) for sites in experts) for experts in table)
            most = max(len(sites) for experts in rows for sites in experts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"table must be [layer][expert] -> list of sites: {error}") from None
        try:
            return cls(num_sites, len(rows[0]), len(rows), most, rows)
        except ValueError:
            return cls(num_sites, len(rows[0]), len(rows), most, rows, even=False)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Placement:
        """The placement that `to_dict` wrote. Raises ValueError when it is not one."""
        try:
            if value.get("even", True):
                placement = cls.from_table(value["owners"], value["num_sites"])
            else:
                placement = cls.uneven(value["owners"], value["num_sites"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"value must be a dict as Placement.to_dict makes it ({error!r})"
            ) from None
        return placement

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON: num_sites and owners [layer][expert] -> sites."""
        owners = [[list(sites) for sites in experts] for experts in self.owners_of]
        uneven = {} if self.even else {"even": False}
        return {"num_sites": self.num_sites, "owners": owners, **uneven}

    # ------------------------------------------------------------------------------- questions

    @property
    def experts_per_site(self) -> int:
        """Experts of one layer that every site holds; the most that one does, where not even."""
        if self.even:
            return self.num_experts * self.replication // self.num_sites
        held: tuple[tuple[tuple[int, ...], ...], ...] = self._residents  # type: ignore[attr-defined]
        return max(len(experts) for of_sites in held for experts in of_sites)

    @property
    def everywhere(self) -> bool:
        """Whether all sites hold all experts."""
        sets = {owners for experts in self.owners_of for owners in experts}
        return all(len(owners) == self.num_sites for owners in sets)

    def owners(self, layer: int, expert: int) -> Owners:
        """The sites that hold an expert, ascending. Raises ValueError for no such expert."""
        self._check_layer_number(layer)
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert must be in [0, {self.num_experts}), got {expert}")
        return self.owners_of[layer][expert]

    def resident(self, layer: int, site: int) -> tuple[int, ...]:
        """The experts of a layer that a site holds, ascending. ValueError for wrong numbers."""
        self._check_layer_number(layer)
        self._check_site(site)
        return self._residents[layer][site]  # type: ignore[attr-defined,no-any-return]

    def held(self, site: int) -> int:
        """Experts, of all layers, that a site holds. Raises ValueError for a wrong number."""
        self._check_site(site)
        return sum(len(of_layer[site]) for of_layer in self._residents)  # type: ignore[attr-defined]

    def owner_sets(self) -> tuple[Owners, ...]:
        """The distinct owner sets of all experts, in ascending order."""
        return tuple(sorted({owners for experts in self.owners_of for owners in experts}))

    def owner_counts(self, layers: tuple[int, ...]) -> Mapping[Owners, int]:
        """Experts of these layers, all counted together, by the sites that hold them."""
        known: dict[tuple[int, ...], Counter[Owners]] = self._owner_counts  # type: ignore[attr-defined]
        if layers not in known:
            known[layers] = Counter()
            for layer in layers:
                known[layers].update(self.owners_of[layer])
        return known[layers]

    def shared_experts(self, first: int, second: int) -> int:
        """Experts, over all layers, that both of two sites hold."""
        self._check_site(first)
        self._check_site(second)
        return sum(
            first in owners and second in owners for experts in self.owners_of for owners in experts
        )

    def transfers(self, new: Placement) -> tuple[Transfer, ...]:
        """What must be sent so that `new` holds, in order of layer, expert and target.

        Every expert a site holds in `new` but not now comes from a present holder; the one that
        has been given the least so far sends it (the lowest number among equals). Raises
        ValueError when `new` is of other sizes.
        """
        mine = (self.num_sites, self.num_experts, self.num_layers, self.replication)
        given = (new.num_sites, new.num_experts, new.num_layers, new.replication)
        if mine != given:
            raise ValueError(
                f"new must be of the same (num_sites, num_experts, num_layers, replication) = "
                f"{mine}, got {given}"
            )
        sends = [0] * self.num_sites
        result = []
        for layer in range(self.num_layers):
            for expert in range(self.num_experts):
                held = self.owners_of[layer][expert]
                for target in new.owners_of[layer][expert]:
                    if target not in held:
                        source = min(held, key=lambda site: (sends[site], site))
                        sends[source] += 1
                        result.append(Transfer(layer, expert, source, target))
        return tuple(result)

    def arrivals(self, new: Placement, site: int) -> tuple[Transfer, ...]:
        """The `transfers` to one site: experts it holds in `new` and not yet, with senders."""
        self._check_site(site)
        return tuple(t for t in self.transfers(new) if t.target == site)

    def _check_layer_number(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")

    def _check_site(self, site: int) -> None:
        if not 0 <= site < self.num_sites:
            raise ValueError(f"site must be in [0, {self.num_sites}), got {site}")


def _check_sizes(
    num_sites: int, num_experts: int, num_layers: int, replication: int, even: bool = True
) -> None:
    """Refuses sizes for which no placement exists, with sizes that would do."""
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
            raise ValueError(f"{name} must be >= 1, got {value}")
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
            f"the same number; got {num_experts} * {replication} over {num_sites} sites. "
            f"Possible: replication {', '.join(map(str, works))} with {num_experts} experts, or "
            f"{experts} experts with replication {replication}"
        )


# -------------------------------------------------------------------------- the cyclic placement


def _even_designs(
    num_sites: int, num_experts: int, num_designs: int, replication: int
) -> list[list[Owners]]:
    """Owner sets of all experts for `num_designs` layers; every one evens out the ones before."""
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
        designs.append([tuple(sorted(sites)) for sites in owners])
    return designs


def _even_out(owners: list[set[int]], total: list[list[int]]) -> None:
    """Switches sites between experts while that makes the pair counts more even.

    A switch (expert a gives site s to b and gets t) leaves every site its number of experts. What
    falls is the sum of squared pair counts, those of this layer first, then those of all layers so
    far, `total`, to which this layer's are added at the end.
    """
    sites, weight = range(len(total)), _LAYER_WEIGHT + 1
    # By pair of sites, half of what the sum grows by when they share one expert more.
    cost = [list(row) for row in total]
    for holders in owners:
        for s in holders:
            for t in holders:
                cost[s][t] += weight
    names = [tuple(sorted(holders)) for holders in owners]
    settled: dict[tuple[Owners, Owners], int] = {}  # pairs without a good switch, and their work
    work, improved = 0, True
    while improved:
        improved = False
        for first, second in combinations(range(len(owners)), 2):
            pair = names[first], names[second]
            a, b = owners[first], owners[second]
            effort = settled.get(pair)
            known = effort is not None
            if effort is None:
                effort = 2 * len(a - b) ** 3
            work += effort
            if work > _MOST_WORK:  # large tables are about even as they are
                improved = False
                break
            if known:
                continue
            only_a, only_b = sorted(a - b), sorted(b - a)
            switch = _best_switch(cost, only_a, only_b)
            if switch is None:
                settled[pair] = effort
                continue
            improved = True
            settled.clear()
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
    """The sites of a and of b that change places, or None where no switch makes the sum less."""

    def gains(sites: Sequence[int], others: Sequence[int]) -> list[int]:
        # Switched, s costs with those of b what it cost with those of a; so does t the other way.
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


# -------------------------------------------------------------------------- the random placement


def _switched(experts: Sequence[Owners], generator: random.Random) -> tuple[Owners, ...]:
    """The owner sets after random switches: two experts each give one holder to the other.

    Only `generator.random()` is used: its stream is the same in all versions of Python.
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
