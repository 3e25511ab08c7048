"""Frozen copies of absent experts: which ones a site keeps, who sends them, and in how many bytes.

A site that holds only some experts can keep copies of others, which it computes but does not train.
At the end of a meeting each is sent anew by one of its holders: the parameters themselves, encoded.
With copies of all absent experts nothing is skipped: every site computes the whole model and trains
a part of it, as in SPES (arXiv 2602.11543). Needs no torch; `fomoe_ext.outer.stale` exchanges what
is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Owners, Placement, Transfer

CODECS = ("fp32", "bf16", "int8", "int4")
"""How copies may travel: some of `wire.CODECS`. Nothing that is lost is sent later."""

Wanted = tuple[tuple[tuple[int, ...], ...], ...]
"""By layer and site, the experts of which a site keeps copies, ascending."""

_PASSES = 8


def wanted_copies(
    placement: Placement, count: int, load: Sequence[Sequence[float]] | None = None
) -> Wanted:
    """By layer and site, `count` absent experts; -1 = all of them.

    load: by layer and expert, how often each is chosen; a site then copies those of its absent
    experts that are chosen most (of equals the first). Without, they are spread evenly: no expert
    is copied much oftener than another. Raises ValueError for more experts than are absent, or a
    load that is not of this placement's layers and experts.
    """
    absent = placement.num_experts - placement.experts_per_site
    if not -1 <= count <= absent:
        raise ValueError(
            f"stale_experts must be -1 (all) or in 0..{absent}, as many as are absent from a site, "
            f"got {count}"
        )
    count = absent if count < 0 else count
    if load is not None:
        if [len(row) for row in load] != [placement.num_experts] * placement.num_layers:
            raise ValueError(
                f"load must be of {placement.num_layers} layers of {placement.num_experts} "
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
    """Sites take turns; each takes what has been taken least, on a circle from its own place."""
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
    """Who sends whom which copy, in order of layer, expert and target; holders share the work.

    Raises ValueError where a site wants a copy of what it holds.
    """
    asked = []
    for layer, of_sites in enumerate(wanted):
        targets: dict[int, list[int]] = {}
        for site, experts in enumerate(of_sites):
            for expert in experts:
                if site in placement.owners(layer, expert):
                    raise ValueError(f"site {site} holds expert {expert} of layer {layer} itself")
                targets.setdefault(expert, []).append(site)
        asked += [(layer, e, target) for e in sorted(targets) for target in targets[e]]
    # The holder that sends the least so far sends the next one; then what still evens out moves.
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
    """Bytes in which an expert of so many elements travels, with a hash of them."""
    return wire.wire_bytes(codec, elements) + wire.HASH_BYTES


def is_due(round_index: int, period: int) -> bool:
    """Whether copies are refreshed at the end of a round; rounds count from 1."""
    return round_index % period == 0


@lru_cache(maxsize=8)
def _copies_sent(placement: Placement, wanted: Wanted) -> tuple[tuple[int, ...], ...]:
    """By site and layer, the copies that it sends."""
    sent = [[0] * placement.num_layers for _ in range(placement.num_sites)]
    for transfer in copy_transfers(placement, wanted):
        sent[transfer.source][transfer.layer] += 1
    return tuple(map(tuple, sent))


def refresh_bytes(
    placement: Placement, wanted: Wanted, site: int, elements: Sequence[int], codec: str
) -> int:
    """Bytes that a site sends to refresh all copies; `elements`: of an expert, by layer.

    Exactly what `OuterSync` counts.
    """
    sent = _copies_sent(placement, wanted)[site]
    return sum(n * copy_bytes(codec, size) for n, size in zip(sent, elements, strict=True))


def copy_waves(
    wanted: Wanted, elements: Sequence[int], codec: str, most_bytes: int
) -> list[list[int]]:
    """Layers whose copies travel together, the same at all sites: as many as arrive at a site in at
    most so many bytes, one at the least; without layers of which nobody wants copies."""
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
