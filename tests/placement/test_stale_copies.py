"""Who keeps frozen copies of which experts, and who sends them."""

from __future__ import annotations

from collections import Counter

import pytest

from fomoe_ext.placement import Placement, stale


@pytest.mark.parametrize("sizes", [(2, 8, 2, 1), (3, 9, 2, 1), (4, 16, 3, 2), (5, 20, 3, 3)])
@pytest.mark.parametrize("kind", ["cyclic", "random"])
def test_copies_and_the_work_of_sending_them_are_spread_evenly(sizes, kind):
    sites, experts, layers, replication = sizes
    named = {
        "num_sites": sites,
        "num_experts": experts,
        "num_layers": layers,
        "replication": replication,
    }
    placement = Placement.cyclic(**named) if kind == "cyclic" else Placement.random(**named, seed=1)
    absent = experts - placement.experts_per_site
    for count in (0, 1, absent // 2, absent, -1):
        wanted = stale.wanted_copies(placement, count)
        each = absent if count == -1 else count
        for layer in range(layers):
            copied = Counter(e for mine in wanted[layer] for e in mine)
            for site, mine in enumerate(wanted[layer]):
                assert len(mine) == each and list(mine) == sorted(set(mine))
                assert not set(mine) & set(placement.resident(layer, site))
            if each:
                numbers = [copied[e] for e in range(experts)]
                assert max(numbers) - min(numbers) <= 2
        transfers = stale.copy_transfers(placement, wanted)
        arrivals = {(t.layer, t.target, t.expert) for t in transfers}
        assert arrivals == {
            (la, s, e) for la in range(layers) for s in range(sites) for e in wanted[la][s]
        }
        assert len(arrivals) == len(transfers)
        assert all(t.source in placement.owners(t.layer, t.expert) for t in transfers)
        sends = Counter(t.source for t in transfers)
        slack = layers if replication == 1 or kind == "random" else 2
        assert max(sends.values(), default=0) - min(sends[s] for s in range(sites)) <= slack
    for count in (-2, absent + 1):
        with pytest.raises(ValueError, match=rf"in \[0, {absent}\], .* got {count}"):
            stale.wanted_copies(placement, count)
    with pytest.raises(ValueError, match="wanted must name absent experts, got expert"):
        own = tuple(tuple((placement.resident(0, 0)[0],) for _ in range(sites)) for _ in range(1))
        stale.copy_transfers(placement, own)


def test_the_most_chosen_absent_experts_are_copied():
    placement = Placement.cyclic(num_sites=2, num_experts=6, num_layers=2, replication=1)
    load = [[1, 9, 9, 0, 2, 3], [0, 0, 5, 0, 0, 7]]
    wanted = stale.wanted_copies(placement, 2, load)
    for layer in range(2):
        for site in range(2):
            mine, absent = wanted[layer][site], set(range(6)) - {*placement.resident(layer, site)}
            assert set(mine) <= absent and list(mine) == sorted(mine) and len(mine) == 2
            left = absent - set(mine)
            assert max(load[layer][e] for e in left) <= min(load[layer][e] for e in mine)
    assert stale.wanted_copies(placement, -1, load) == stale.wanted_copies(placement, -1)
    for wrong in (load[:1], [load[0], load[1][:5]]):
        with pytest.raises(ValueError, match="load must be for 2 layers of 6 experts, got"):
            stale.wanted_copies(placement, 2, wrong)


def test_layers_travel_together_as_far_as_there_is_room():
    wanted = (((1, 2), (3,)), ((), ()), ((0,), ()), ((5,), (4,)))
    sizes = [100] * 4
    one = stale.copy_bytes("fp32", 100)
    assert one == 408
    assert stale.copy_waves(wanted, sizes, "fp32", 1) == [[0], [2], [3]]
    assert stale.copy_waves(wanted, sizes, "fp32", 3 * one) == [[0, 2], [3]]
    assert stale.copy_waves(wanted, sizes, "fp32", 10**9) == [[0, 2, 3]]
    assert stale.copy_waves((((), ()),), sizes, "fp32", 10) == []
