"""Placement: which site holds which expert, layer by layer. Plain Python, no torch.

Every expert is on exactly `replication` sites and every site holds the same number of experts of
each layer, so that all sites need the same memory and work. The tables of cyclic and random
placements come from `fomoe_ext.placement.designs`, those by what tokens choose together from
`fomoe_ext.placement.coactivation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from fomoe_ext.checks import a_bool
from fomoe_ext.placement.designs import check_sizes, cyclic_table, random_table

Owners = tuple[int, ...]
"""The sites that hold an expert, ascending."""


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
        check_sizes(*sizes, even=self.even)
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
        cls, *, num_sites: int, num_experts: int, num_layers: int, replication: int
    ) -> Placement:
        """The fixed, evenly spread placement; depends on nothing but these sizes.

        Any two sites share about the same number of experts, in a layer and over all layers. Raises
        ValueError for impossible sizes.
        """
        table = cyclic_table(num_sites, num_experts, num_layers, replication)
        return cls(num_sites, num_experts, num_layers, replication, table)

    @classmethod
    def random(
        cls,
        *,
        num_sites: int,
        num_experts: int,
        num_layers: int,
        replication: int,
        seed: int,
        epoch: int = 0,
    ) -> Placement:
        """A placement drawn from (seed, epoch), the same one on every site and machine.

        Drawn near uniformly among all placements of these sizes: the cyclic one with its experts
        shuffled, then ten random switches per (expert, site) pair (a Markov chain whose stationary
        distribution is uniform). Raises ValueError for impossible sizes.
        """
        start = cyclic_table(num_sites, num_experts, num_layers, replication)
        table = random_table(start, seed, epoch)
        return cls(num_sites, num_experts, num_layers, replication, table)

    @classmethod
    def from_coactivation(
        cls, counts: Any, *, num_sites: int, replication: int, together: bool = True
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
                tensor; what is on the diagonal does not matter. `fomoe_ext.report.measured`
                reads those of a run.
            num_sites, replication: as of the other placements.
            together: on the same sites, or apart.

        Raises ValueError or TypeError naming the argument, for impossible sizes too.
        """
        from fomoe_ext.placement.coactivation import checked_counts, search  # loads numpy

        a_bool(together=together)
        table = checked_counts(counts)
        num_layers, num_experts = table.shape[:2]
        start = cyclic_table(num_sites, num_experts, num_layers, replication)
        return cls.from_table(search(table, start, num_sites, together), num_sites)

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

    def num_resident(self, site: int) -> int:
        """How many experts a site holds, over all layers. ValueError for a wrong number."""
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
