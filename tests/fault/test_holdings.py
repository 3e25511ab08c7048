"""Which sites hold which experts as sites come and go: orphans, moves with their optimizer state,
shadow copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outer_model import EXPERTS, LAYERS, SmallModel, bits, cyclic_placement
from sites import pool
from small_sync import make, take_steps
from torch import Tensor

from fomoe_ext.fault import ownership
from fomoe_ext.fault.shadows import Shadows
from fomoe_ext.outer import OuterOptions, OuterSync
from fomoe_ext.outer.belongings import Belongings, biases_of, items_of, ship
from fomoe_ext.outer.reduce import Damaged
from fomoe_ext.placement import Placement, wire

# ----------------------------------------------------------------------------------- who holds what


@st.composite
def holdings_and_more(draw: st.DrawFn) -> tuple[list[list[list[int]]], int, int]:
    """Experts held by each of 1 to 5 sites in 1 to 3 layers, some by none; their number;
    replication."""
    sites, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    layers = draw(st.integers(1, 3))
    subsets = st.lists(st.integers(0, experts - 1), unique=True).map(sorted)
    held = [[draw(subsets) for _ in range(layers)] for _ in range(sites)]
    return held, experts, draw(st.integers(1, 6))


def held_by(placement: Placement, site: int) -> list[set[int]]:
    return [set(placement.resident(layer, site)) for layer in range(placement.num_layers)]


@given(holdings_and_more())
def test_orphans_find_a_holder_and_nobody_loses_an_expert(
    given_: tuple[list[list[list[int]]], int, int],
) -> None:
    holdings, experts, _ = given_
    lost = ownership.orphans(holdings, experts)
    placement = ownership.adopt_orphans(holdings, experts)
    for site, layers in enumerate(holdings):
        for layer, mine in enumerate(layers):
            assert set(mine) <= held_by(placement, site)[layer]
    for layer in range(placement.num_layers):
        for expert in range(experts):
            found = {s for s, layers in enumerate(holdings) if expert in layers[layer]}
            assert ((layer, expert) in lost) == (not found)
            assert set(placement.owners(layer, expert)) == found or (
                not found and len(placement.owners(layer, expert)) == 1
            )


def test_orphans_go_to_the_site_with_a_copy() -> None:
    holdings = [[[0, 1]], [[2]], [[3, 4, 5]]]
    placement = ownership.adopt_orphans(holdings, 8, {(0, 6): 2})
    assert placement.owners(0, 6) == (2,) and placement.owners(0, 7) == (1,)


@given(holdings_and_more())
def test_experts_are_shared_out_evenly_with_few_moves(
    given_: tuple[list[list[list[int]]], int, int],
) -> None:
    holdings, experts, replication = given_
    if ownership.orphans(holdings, experts):
        with pytest.raises(ValueError, match="holdings must contain all experts"):
            ownership.rebalance(holdings, experts, replication)
        return
    placement = ownership.rebalance(holdings, experts, replication)
    assert ownership.is_level(placement, replication)
    # A balanced placement is not changed.
    level = [
        [list(placement.resident(layer, site)) for layer in range(placement.num_layers)]
        for site in range(placement.num_sites)
    ]
    assert ownership.rebalance(level, experts, replication) == placement


def test_after_a_death_only_what_is_missing_moves() -> None:
    whole = Placement.cyclic(num_sites=4, num_experts=16, num_layers=2, replication=2)
    left = [[list(whole.resident(layer, s)) for layer in range(2)] for s in (0, 1, 3)]
    placement = ownership.rebalance(left, 16, 2)
    moved = sum(
        len(held_by(placement, site)[layer] - set(left[site][layer]))
        for site in range(3)
        for layer in range(2)
    )
    # The dead site's eight of each layer, and a few more to balance the sites.
    assert moved <= 2 * (8 + 2)
    assert not placement.even and Placement.from_dict(placement.to_dict()) == placement


def test_a_new_site_takes_experts_from_the_fullest() -> None:
    left = ownership.rebalance([[[0, 1, 2, 3]], [[4, 5, 6, 7]]], 8, 1)
    holdings = [[list(left.resident(0, s))] for s in range(2)] + [[[]]]
    placement = ownership.rebalance(holdings, 8, 1)
    assert sorted(len(placement.resident(0, s)) for s in range(3)) == [2, 3, 3]
    for site in range(2):
        assert set(placement.resident(0, site)) <= set(holdings[site][0])


# --------------------------------------------------------------------------- belongings and shadows


def moved_over(site: int, num_sites: int) -> None:
    """An expert of site 0 moves to site 2 with its anchor, momentum and optimizer state."""
    model, inner, sync = make(site, num_sites, "resident", codec="int4")
    for index in range(2):
        take_steps(model, inner, site, index)
        sync.step()
    old = sync.placement
    item = (0, old.resident(0, 0)[0])
    target = next(s for s in range(num_sites) if s not in old.owners(*item))
    mine, here = Belongings.of(sync.state), items_of(sync.layout)
    biases = biases_of(sync.layout)
    assert mine.names() == ["anchor", "exp_avg", "exp_avg_sq", "momentum"]
    some = next(iter(item_ for item_ in here if item_ and item_[0] == 0))
    length = 4 * sum(p.numel for p in here[some]) + sum(p.numel for p in biases[some])
    vectors = {item: mine.vector(here[item], biases[item])} if site == 0 else {}
    everyone = sync.groups.group(sync.groups.everyone)
    arrived, sent = ship(everyone, site, [(item, 0, target)], {item: length}, vectors)
    assert sent == (4 * length + wire.HASH_BYTES if site == 0 else 0)
    assert list(arrived) == ([item] if site == target else [])

    table = [[list(o) for o in layer] for layer in old.table]
    table[0][item[1]] = [*old.owners(*item), target]
    new = Placement.uneven(table, num_sites)
    model2 = SmallModel(new, site, "resident", balance="bias", balance_bias_rate=0.01)
    inner2 = torch.optim.AdamW(model2.parameters(), lr=0.05)
    sync2 = OuterSync(
        model2,
        new,
        site,
        OuterOptions(codec="int4"),
        inner_optimizer=inner2,
        groups=sync.groups,
        arriving=True,
    )
    wanted = items_of(sync2.layout)
    for found, vector in arrived.items():
        mine.take(vector, wanted[found], biases_of(sync2.layout)[found], mine.names())
    mine.fill(sync2.state)
    sync2.log.round = sync.round
    sync2.verify()  # all holders, the new one too, have the same bits
    own, before = Belongings.of(sync2.state), Belongings.of(sync.state)
    for what, tensors in before.tensors.items():
        for key, value in tensors.items():
            assert bits(own.tensors[what][key]) == bits(value), (what, key)
    assert own.steps == before.steps
    take_steps(model2, inner2, site, 2)
    sync2.step()
    sync2.verify()


def test_experts_move_with_all_that_belongs_to_them() -> None:
    pool().run(3, moved_over)


def damaged_on_the_way(site: int, num_sites: int) -> None:
    _, _, sync = make(site, num_sites)
    everyone = sync.groups.group(sync.groups.everyone)
    right = everyone.send_to_each

    def damaging(received: Tensor, sent: Tensor, *sizes: Any) -> int:
        if site == 0:
            sent.view(torch.uint8)[5] ^= 4
        return right(received, sent, *sizes)

    everyone.send_to_each = damaging
    vector = {(0, 0): torch.arange(7.0)} if site == 0 else {}
    if site == 1:
        with pytest.raises(Damaged, match="site 0 sent"):
            ship(everyone, site, [((0, 0), 0, 1)], {(0, 0): 7}, vector)
    else:
        ship(everyone, site, [((0, 0), 0, 1)], {(0, 0): 7}, vector)


def test_a_damaged_expert_is_refused() -> None:
    pool().run(2, damaged_on_the_way)


def kept_shadows(site: int, num_sites: int, scope: str, optimizer: str) -> dict[Any, Any]:
    placement = cyclic_placement(num_sites, 1)
    model = SmallModel(placement, site, scope, balance="bias", balance_bias_rate=0.01)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(
        model, placement, site, OuterOptions(optimizer=optimizer), inner_optimizer=inner
    )
    take_steps(model, inner, site, 0)
    sync.step()
    shadows = Shadows()
    sent = shadows.refresh(sync)
    expert = sum(p.numel for p in items_of(sync.layout)[0, placement.resident(0, site)[0]])
    row = model.layers[0].router.weight.shape[1]
    sizes = wire.Sizes(0, 0, expert - (row if scope == "resident" else 0), row)
    elements = wire.shadow_elements(
        sizes, router_scope=scope, selection_bias=True, outer_momentum=bool(sync.state.momenta)
    )
    assert sent == wire.shadow_bytes(placement, site, elements)
    assert shadows.round == 1
    assert shadows.nbytes == wire.shadow_memory(placement, site, elements) > 0
    mine, here, biases = Belongings.of(sync.state), items_of(sync.layout), biases_of(sync.layout)
    mine.tensors = {k: v for k, v in mine.tensors.items() if k in ("anchor", "momentum", "bias")}
    held = {i: bits(mine.vector(here[i], biases.get(i, []))) for i in here if i is not None}
    kept = {key: bits(shadows._vectors[key]) for key in shadows.experts}
    return {"held": held, "kept": kept}


@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize("optimizer", ["diloco", "fedavg"])
def test_every_expert_has_a_shadow_elsewhere(scope: str, optimizer: str) -> None:
    placement = cyclic_placement(3, 1)
    sites = pool().run(3, kept_shadows, scope, optimizer)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            (owner,) = placement.owners(layer, expert)
            keeper = wire.shadow_site(placement, layer, expert)
            assert keeper is not None and keeper != owner
            assert sites[keeper]["kept"][layer, expert] == sites[owner]["held"][layer, expert]
    assert sum(len(site["kept"]) for site in sites) == LAYERS * EXPERTS


def test_experts_that_all_sites_hold_have_no_shadow() -> None:
    placement = Placement.cyclic(num_sites=2, num_experts=4, num_layers=1, replication=2)
    assert wire.shadow_site(placement, 0, 0) is None
    assert wire.shadow_parcels(placement) == []
