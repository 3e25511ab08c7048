"""Placement: which site holds which expert, layer by layer. Plain Python, no torch.

Every expert is on exactly `replication` sites, and every site holds the same number of experts of
each layer, so that all sites need the same memory and do the same work. The tables of cyclic and
random placements are made in `fomoe_ext.placement.designs`, those of `from_coactivation` in
`fomoe_ext.placement.coactivation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from fomoe_ext.checks import a_bool, an_int
from fomoe_ext.placement.designs import check_sizes, cyclic_table, random_table

Owners = tuple[int, ...]
"""The sites that hold an expert, ascending."""


class Transfer(NamedTuple):
    """Site `source` sends expert `expert` of layer `layer` to site `target`."""

    layer: int
    expert: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which sites hold which experts.

    Usually made by `cyclic`, `random`, `from_coactivation` or `from_table`. Names that begin with
    num_ are counts; `owners` and `resident` return numbers (ids) of sites and experts.

    Raises ValueError if the table does not have these sizes, if an expert is not on exactly
    `replication` sites, or if sites hold different numbers of experts of a layer.
    """

    num_sites: int
    num_experts: int
    """Experts of one layer."""
    num_layers: int
    """MoE layers."""
    replication: int
    """Sites that hold each expert."""
    table: tuple[tuple[Owners, ...], ...]
    """table[layer][expert] = numbers of the sites that hold the expert, ascending."""
    even: bool = True
    """False: an expert may be on fewer than `replication` sites, and sites may hold different
    numbers of experts, as after the loss of a site."""

    def __post_init__(self) -> None:
        a_bool(even=self.even)
        sizes = self.num_sites, self.num_experts, self.num_layers, self.replication
        check_sizes(*sizes, even=self.even)
        if len(self.table) != self.num_layers:
            raise ValueError(
                f"table must have num_layers = {self.num_layers} layers, got {len(self.table)}"
            )
        residents: dict[int, tuple[tuple[int, ...], ...]] = {}
        for layer, experts in enumerate(self.table):
            if id(experts) in residents:  # a cyclic placement repeats a few different layers
                continue
            _check_layer(self, layer, experts)
            held: list[list[int]] = [[] for _ in range(self.num_sites)]
            for expert, owners in enumerate(experts):
                for site in owners:
                    held[site].append(expert)
            residents[id(experts)] = tuple(map(tuple, held))
        of_layers = tuple(residents[id(experts)] for experts in self.table)
        object.__setattr__(self, "_residents", of_layers)
        object.__setattr__(self, "_num_by_owners", {})

    # -------------------------------------------------------------------------- constructors

    @classmethod
    def cyclic(
        cls, *, num_sites: int, num_experts: int, num_layers: int, replication: int
    ) -> Placement:
        """The default placement, which depends only on its sizes.

        Any two sites share about the same number of experts, in each layer and over all layers.
        Raises ValueError for impossible sizes.
        """
        table = cyclic_table(num_sites, num_experts, num_layers, replication)
        return cls(
            num_sites=num_sites,
            num_experts=num_experts,
            num_layers=num_layers,
            replication=replication,
            table=table,
        )

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
        """A random placement that depends only on the arguments, so that all sites draw the same.

        It is drawn almost uniformly from all placements of these sizes: the experts of the cyclic
        placement are shuffled, then ten random switches per (expert, site) pair are tried (a Markov
        chain whose stationary distribution is uniform). Raises ValueError for impossible sizes,
        TypeError for a seed or epoch that is no int.
        """
        an_int(seed=seed, epoch=epoch)
        start = cyclic_table(num_sites, num_experts, num_layers, replication)
        table = random_table(start, seed, epoch)
        return cls(
            num_sites=num_sites,
            num_experts=num_experts,
            num_layers=num_layers,
            replication=replication,
            table=table,
        )

    @classmethod
    def from_coactivation(
        cls, counts: Any, *, num_sites: int, replication: int, together: bool = True
    ) -> Placement:
        """A placement from measured counts of how often one token chooses two experts together.

        In each layer it maximises (`together`) or minimises (not `together`) the sum of the counts
        of all pairs of experts that share a site, over all sites. The expected number of a token's
        experts on a site is the same in all placements of these sizes. With pairs together, a token
        more often finds all or none of its experts on a site; with pairs apart, some of them. Load
        is not balanced: one site may hold more heavily used experts than another. The search is
        greedy, followed by pairwise swaps to a local optimum. Its result is the same on all
        machines and never worse than the cyclic placement.

        Args:
            counts: ints [L, E, E] by layer, at least 0 and symmetric, as nested lists, an array or
                a tensor; the diagonal is ignored. `fomoe_ext.report.measured` reads the counts of
                a run.
            num_sites, replication: as in `cyclic`.
            together: whether pairs with large counts go to the same sites or to different ones.

        Raises ValueError or TypeError naming the argument, also for impossible sizes.
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
        """A placement from a table [layer][expert] -> sites, in any order.

        num_sites: None = the largest site number + 1. The replication is the length of the table's
        entries. Raises ValueError if the table is not a valid even placement.
        """
        try:
            rows = tuple(tuple(tuple(sorted(sites)) for sites in experts) for experts in table)
        except TypeError as error:
            raise ValueError(f"table must be [layer][expert] -> list of sites: {error}") from None
        if not rows or not rows[0] or not rows[0][0]:
            raise ValueError("table must have at least one layer, one expert and one site")
        held = chain.from_iterable(chain.from_iterable(rows))
        largest = 0
        for site in held:
            if not isinstance(site, int):
                raise ValueError(f"table must hold site numbers, got {site!r}")
            largest = max(largest, site)
        sites = largest + 1 if num_sites is None else num_sites
        return cls(
            num_sites=sites,
            num_experts=len(rows[0]),
            num_layers=len(rows),
            replication=len(rows[0][0]),
            table=rows,
        )

    @classmethod
    def uneven(cls, table: Sequence[Sequence[Sequence[int]]], num_sites: int) -> Placement:
        """As `from_table`, but sites may hold different numbers of experts.

        `replication` is the largest number of holders of an expert. An even table gives the same
        placement as with `from_table`. Raises ValueError if an expert has no holder or a site is
        not in [0, num_sites).
        """
        try:
            rows = tuple(tuple(tuple(sorted(sites)) for sites in experts) for experts in table)
            most = max(len(sites) for experts in rows for sites in experts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"table must be [layer][expert] -> list of sites: {error}") from None
        sizes = {
            "num_sites": num_sites,
            "num_experts": len(rows[0]),
            "num_layers": len(rows),
            "replication": most,
        }
        try:
            return cls(**sizes, table=rows)
        except ValueError:
            return cls(**sizes, table=rows, even=False)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Placement:
        """The placement from the dict that `to_dict` returned. ValueError for any other dict."""
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
        """A dict for JSON: "num_sites" and "owners", a list [layer][expert] of lists of sites."""
        owners = [[list(sites) for sites in experts] for experts in self.table]
        uneven = {} if self.even else {"even": False}
        return {"num_sites": self.num_sites, "owners": owners, **uneven}

    # --------------------------------------------------------------------------------- queries

    @property
    def experts_per_site(self) -> int:
        """Number of experts of a layer that each site holds; the largest one if not `even`."""
        if self.even:
            return self.num_experts * self.replication // self.num_sites
        held: tuple[tuple[tuple[int, ...], ...], ...] = self._residents  # type: ignore[attr-defined]
        return max(len(experts) for of_sites in held for experts in of_sites)

    @property
    def all_resident(self) -> bool:
        """Whether all sites hold all experts."""
        sets = {owners for experts in self.table for owners in experts}
        return all(len(owners) == self.num_sites for owners in sets)

    def owners(self, layer: int, expert: int) -> Owners:
        """Numbers of the sites that hold an expert, ascending. ValueError for a wrong number."""
        self._check_layer_number(layer)
        an_int(expert=expert)
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert must be in [0, {self.num_experts}), got {expert}")
        return self.table[layer][expert]

    def resident(self, layer: int, site: int) -> tuple[int, ...]:
        """Numbers of the experts of a layer that a site holds, ascending. ValueError for a wrong
        number."""
        self._check_layer_number(layer)
        self._check_site(site)
        return self._residents[layer][site]  # type: ignore[attr-defined,no-any-return]

    def num_resident(self, site: int) -> int:
        """Number of experts that a site holds, over all layers. ValueError for a wrong number."""
        self._check_site(site)
        return sum(len(of_layer[site]) for of_layer in self._residents)  # type: ignore[attr-defined]

    def owner_sets(self) -> tuple[Owners, ...]:
        """All distinct sets of `owners` of experts, in ascending order."""
        return tuple(sorted({owners for experts in self.table for owners in experts}))

    def num_by_owners(self, layers: tuple[int, ...]) -> Mapping[Owners, int]:
        """Number of experts in these layers for each set of sites that holds some."""
        known: dict[tuple[int, ...], Counter[Owners]] = self._num_by_owners  # type: ignore[attr-defined]
        if layers not in known:
            known[layers] = Counter()
            for layer in layers:
                known[layers].update(self.table[layer])
        return known[layers]

    def num_shared(self, first: int, second: int) -> int:
        """Number of experts, over all layers, that two sites both hold."""
        self._check_site(first)
        self._check_site(second)
        return sum(
            first in owners and second in owners for experts in self.table for owners in experts
        )

    def transfers(self, new: Placement) -> tuple[Transfer, ...]:
        """What sites must send to change from this placement to `new`, in order of layer, expert
        and target.

        An expert that a site holds only in `new` comes from a current holder: the one with the
        fewest transfers so far, among equals the one with the lowest number. Raises ValueError if
        `new` has other sizes.
        """
        mine = (self.num_sites, self.num_experts, self.num_layers, self.replication)
        given = (new.num_sites, new.num_experts, new.num_layers, new.replication)
        if mine != given:
            raise ValueError(
                f"new must have the same (num_sites, num_experts, num_layers, replication) = "
                f"{mine}, got {given}"
            )
        sends = [0] * self.num_sites
        result = []
        for layer in range(self.num_layers):
            for expert in range(self.num_experts):
                held = self.table[layer][expert]
                for target in new.table[layer][expert]:
                    if target not in held:
                        source = min(held, key=lambda site: (sends[site], site))
                        sends[source] += 1
                        result.append(Transfer(layer, expert, source, target))
        return tuple(result)

    def arrivals(self, new: Placement, site: int) -> tuple[Transfer, ...]:
        """The `transfers` to one site: the experts that it holds only in `new`, with senders."""
        self._check_site(site)
        return tuple(t for t in self.transfers(new) if t.target == site)

    def _check_layer_number(self, layer: int) -> None:
        an_int(layer=layer)
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")

    def _check_site(self, site: int) -> None:
        an_int(site=site)
        if not 0 <= site < self.num_sites:
            raise ValueError(f"site must be in [0, {self.num_sites}), got {site}")


def _check_layer(placement: Placement, layer: int, experts: Sequence[Owners]) -> None:
    """ValueError unless a layer of the table fits the sizes of the placement."""
    if len(experts) != placement.num_experts:
        raise ValueError(
            f"table[{layer}] must have num_experts = {placement.num_experts} entries, got "
            f"{len(experts)}"
        )
    good: set[Owners] = set()
    for expert, owners in enumerate(experts):
        if isinstance(owners, tuple) and owners in good:
            continue
        where = f"table[{layer}][{expert}]"
        if not isinstance(owners, tuple) or not all(type(s) is int for s in owners):
            raise ValueError(f"{where} must be a tuple of site numbers, got {owners!r}")
        if any(not 0 <= s < placement.num_sites for s in owners):
            raise ValueError(f"{where} must be sites in [0, {placement.num_sites}), got {owners}")
        if list(owners) != sorted(set(owners)):
            raise ValueError(f"{where} must be ascending and without repeats, got {owners}")
        if len(owners) != placement.replication and (placement.even or not owners):
            raise ValueError(
                f"{where} must name replication = {placement.replication} sites, got {owners}"
            )
        good.add(owners)
    if not placement.even:
        return
    counts = Counter(chain.from_iterable(experts))
    held = [counts[site] for site in range(placement.num_sites)]
    if len(set(held)) > 1:
        raise ValueError(
            f"every site must hold {placement.experts_per_site} experts of layer {layer}, got "
            f"{held} at sites 0..{placement.num_sites - 1}"
        )
