"""Frozen copies of absent experts: which copies a site keeps, which site sends them, their bytes.

A site can keep copies of experts that it does not hold. It computes with them but does not train
them. At the end of a meeting, one holder of each such expert sends its encoded parameters. With
copies of all absent experts no slot is skipped: every site computes the whole model and trains a
part of it, as in SPES (arXiv 2602.11543). Needs no torch; `fomoe_ext.outer.stale` exchanges the
copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Owners, Placement, Transfer

CODECS = ("fp32", "bf16", "int8", "int4")
"""Codecs for copies. topk is missing: without error feedback it would lose too much."""

Wanted = tuple[tuple[tuple[int, ...], ...], ...]
"""For each layer and site, the experts of which the site keeps copies, ascending."""

_PASSES = 8


def wanted_copies(
    placement: Placement, count: int, load: Sequence[Sequence[float]] | None = None
) -> Wanted:
    """For each layer and site, `count` absent experts (-1 = all of them) to keep copies of.

    `load`: how often each expert is chosen, by layer and expert. A site copies the absent experts
    that are chosen most (ties: the lowest number). Without a load, each expert is copied about
    equally often. Raises ValueError if `count` is larger than the number of absent experts, or for
    a load of other sizes than the placement.
    """
    absent = placement.num_experts - placement.experts_per_site
    if not -1 <= count <= absent:
        raise ValueError(
            f"stale_experts must be -1 (all) or in [0, {absent}], the number of experts that a "
            f"site lacks, got {count}"
        )
    count = absent if count < 0 else count
    if load is not None:
        if [len(row) for row in load] != [placement.num_experts] * placement.num_layers:
            raise ValueError(
                f"load must be for {placement.num_layers} layers of {placement.num_experts} "
                f"experts, got {len(load)} layers of {sorted({len(row) for row in load})}"
            )
        return tuple(
            _most_chosen(owners, placement.num_sites, count, row)
            for owners, row in zip(placement.table, load, strict=True)
        )
    return tuple(_of_layer(owners, placement.num_sites, count) for owners in placement.table)


@lru_cache(maxsize=64)
def _of_layer(
    owners: tuple[Owners, ...], num_sites: int, count: int
) -> tuple[tuple[int, ...], ...]:
    """Sites choose in turn. Each takes the absent expert with the fewest copies so far; ties go to
    the first one after the site's own offset."""
    experts = len(owners)
    taken = [0] * experts
    chosen: list[list[int]] = [[] for _ in range(num_sites)]
    for _ in range(count):
        for site, mine in enumerate(chosen):
            start = site * experts // num_sites
            free = (e for e in range(experts) if site not in owners[e] and e not in mine)
            expert = min(free, key=lambda e, start=start: (taken[e], (e - start) % experts))
            taken[expert] += 1
            mine.append(expert)
    return tuple(tuple(sorted(mine)) for mine in chosen)


def _most_chosen(
    owners: tuple[Owners, ...], num_sites: int, count: int, load: Sequence[float]
) -> tuple[tuple[int, ...], ...]:
    by_load = sorted(range(len(owners)), key=lambda expert: (-load[expert], expert))
    absent = [[e for e in by_load if site not in owners[e]] for site in range(num_sites)]
    return tuple(tuple(sorted(experts[:count])) for experts in absent)


@lru_cache(maxsize=8)
def copy_transfers(placement: Placement, wanted: Wanted) -> tuple[Transfer, ...]:
    """The transfers of all copies, in order of layer, expert and target, spread over the holders.

    Raises ValueError if a site wants a copy of an expert that it holds.
    """
    asked = []
    for layer, of_sites in enumerate(wanted):
        targets: dict[int, list[int]] = {}
        for site, experts in enumerate(of_sites):
            for expert in experts:
                if site in placement.owners(layer, expert):
                    raise ValueError(
                        f"wanted must name absent experts, got expert {expert} of layer "
                        f"{layer} for site {site}, which holds it"
                    )
                targets.setdefault(expert, []).append(site)
        asked += [(layer, e, target) for e in sorted(targets) for target in targets[e]]
    # Each copy goes to the holder that sends fewest so far; further passes even this out.
    sends = [0] * placement.num_sites
    sources: list[int | None] = [None] * len(asked)
    for _ in range(_PASSES):
        moved = False
        for i, (layer, expert, _) in enumerate(asked):
            now = sources[i]
            best = min(placement.owners(layer, expert), key=lambda site: (sends[site], site))
            if now is None or sends[best] + 1 < sends[now]:
                sends[best] += 1
                sources[i], moved = best, True
                if now is not None:
                    sends[now] -= 1
        if not moved:
            break
    return tuple(
        Transfer(layer, expert, source, target)
        for (layer, expert, target), source in zip(asked, sources, strict=True)
        if source is not None
    )


def copy_bytes(codec: str, elements: int) -> int:
    """Bytes of one expert's copy on the wire, with its hash."""
    return wire.wire_bytes(codec, elements) + wire.HASH_BYTES


def is_due(round_index: int, period: int) -> bool:
    """Whether copies are refreshed at the end of a round; rounds count from 1."""
    return round_index % period == 0


@lru_cache(maxsize=8)
def _copies_sent(placement: Placement, wanted: Wanted) -> tuple[tuple[int, ...], ...]:
    """For each site and layer, the number of copies that the site sends."""
    sent = [[0] * placement.num_layers for _ in range(placement.num_sites)]
    for transfer in copy_transfers(placement, wanted):
        sent[transfer.source][transfer.layer] += 1
    return tuple(map(tuple, sent))


def refresh_bytes(
    placement: Placement, wanted: Wanted, site: int, elements: Sequence[int], codec: str
) -> int:
    """Bytes that a site sends to refresh all copies; equal to what `OuterSync` counts.

    elements: of one expert, by layer.
    """
    sent = _copies_sent(placement, wanted)[site]
    return sum(n * copy_bytes(codec, size) for n, size in zip(sent, elements, strict=True))


def copy_waves(
    wanted: Wanted, elements: Sequence[int], codec: str, most_bytes: int
) -> list[list[int]]:
    """Groups of layers whose copies travel together; the same at all sites.

    A wave has as many layers as a site can receive with `most_bytes`, but at least one. Layers
    without copies are left out.
    """
    waves: list[list[int]] = []
    filled = 0
    for layer, of_sites in enumerate(wanted):
        size = max(map(len, of_sites)) * copy_bytes(codec, elements[layer])
        if not size:
            continue
        if not waves or filled + size > most_bytes:
            waves.append([])
            filled = 0
        waves[-1].append(layer)
        filled += size
    return waves
