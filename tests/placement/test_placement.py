"""Placement: every expert on its number of sites, every site the same load, even sharing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from balanced_load import check_load
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_ext.placement import Placement


def pair_counts(placement: Placement, layers: range) -> list[int]:
    """Experts that each pair of sites shares in the given layers."""
    counts = Counter(dict.fromkeys(combinations(range(placement.num_sites), 2), 0))
    for layer in layers:
        for owners in placement.table[layer]:
            counts.update(combinations(owners, 2))
    return list(counts.values())


SIZES = ("num_sites", "num_experts", "num_layers", "replication")


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    sites = draw(st.integers(1, 9))
    replication = draw(st.integers(1, sites))
    experts = draw(st.integers(1, 5)) * sites
    return sites, experts, draw(st.integers(1, 5)), replication


def named(size: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(SIZES, size, strict=True))


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**40), st.integers(0, 99))
def test_every_placement_is_balanced(
    size: tuple[int, int, int, int], seed: int, epoch: int
) -> None:
    for placement in (
        Placement.cyclic(**named(size)),
        Placement.random(**named(size), seed=seed, epoch=epoch),
    ):
        check_load(placement)
        assert Placement.from_dict(json.loads(json.dumps(placement.to_dict()))) == placement
        for layer in range(placement.num_layers):
            for site in range(placement.num_sites):
                residents = placement.resident(layer, site)
                assert list(residents) == sorted(residents)
                assert residents == tuple(
                    e for e in range(placement.num_experts) if site in placement.owners(layer, e)
                )
        wanted = {owners for experts in placement.table for owners in experts}
        assert placement.owner_sets() == tuple(sorted(wanted))


@pytest.mark.parametrize("num_sites", [2, 3, 4, 5, 6, 7, 8])
def test_cyclic_spreads_pairs_evenly(num_sites: int) -> None:
    for replication in range(1, num_sites + 1):
        for factor in (1, 2, 3, 5, 8):
            placement = Placement.cyclic(
                num_sites=num_sites,
                num_experts=factor * num_sites,
                num_layers=num_sites,
                replication=replication,
            )
            for layer in range(num_sites):
                counts = pair_counts(placement, range(layer, layer + 1))
                assert max(counts) - min(counts) <= 1, (replication, factor, layer)
            counts = pair_counts(placement, range(num_sites))
            assert max(counts) - min(counts) <= 4, (replication, factor)
            a, b = 0, num_sites - 1
            shared = sum(a in o and b in o for e in placement.table for o in e)
            assert placement.num_shared(a, b) == shared


def test_cyclic_beats_windows_and_uses_every_owner_set() -> None:
    # Windows {e, e + 1} give sites 0 and 2 of 4 nothing to share.
    placement = Placement.cyclic(num_sites=4, num_experts=6, num_layers=1, replication=2)
    assert pair_counts(placement, range(1)) == [1] * 6
    # The projective plane of order 2: any two of 7 sites share exactly one of 7 experts.
    assert (
        pair_counts(
            Placement.cyclic(num_sites=7, num_experts=7, num_layers=1, replication=3), range(1)
        )
        == [1] * 21
    )


def test_cyclic_differs_by_layer() -> None:
    placement = Placement.cyclic(num_sites=4, num_experts=8, num_layers=8, replication=2)
    for expert in range(8):
        owners = {placement.owners(layer, expert) for layer in range(8)}
        assert len(owners) >= 4
        assert {site for o in owners for site in o} == {0, 1, 2, 3}


def test_one_owner_and_all_owners() -> None:
    alone = Placement.cyclic(num_sites=4, num_experts=8, num_layers=3, replication=1)
    for layer in range(3):
        held = [alone.resident(layer, site) for site in range(4)]
        assert sorted(e for ids in held for e in ids) == list(range(8))
    everywhere = Placement.cyclic(num_sites=3, num_experts=5, num_layers=2, replication=3)
    assert everywhere.owner_sets() == ((0, 1, 2),)
    assert everywhere.resident(1, 2) == (0, 1, 2, 3, 4)
    assert everywhere.experts_per_site == 5


def test_random_depends_on_seed_and_epoch_alone() -> None:
    size = (4, 16, 3, 2)
    first = Placement.random(**named(size), seed=1, epoch=2)
    assert first == Placement.random(**named(size), seed=1, epoch=2)
    others = [
        Placement.random(**named(size), seed=1, epoch=3),
        Placement.random(**named(size), seed=2, epoch=2),
    ]
    assert first not in others and others[0] != others[1]
    program = (
        "from fomoe_ext.placement import Placement;"
        "print(Placement.random(num_sites=4, num_experts=16, num_layers=3, replication=2, "
        "seed=1, epoch=2).to_dict())"
    )
    text = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert text.strip() == str(first.to_dict())


def test_random_is_near_uniform() -> None:
    # With 2 of 4 sites and 6 experts every owner set is as likely as another, by symmetry.
    counts: Counter[tuple[int, ...]] = Counter()
    for epoch in range(600):
        counts[
            Placement.random(
                num_sites=4, num_experts=6, num_layers=1, replication=2, seed=0, epoch=epoch
            ).owners(0, 3)
        ] += 1
    assert len(counts) == 6
    assert max(counts.values()) < 150 and min(counts.values()) > 60  # 100 expected, sd 9


@pytest.mark.parametrize("seed", range(5))
def test_transfers_lead_to_the_new_placement(seed: int) -> None:
    old = Placement.random(
        num_sites=6, num_experts=12, num_layers=3, replication=2, seed=seed, epoch=0
    )
    new = Placement.random(
        num_sites=6, num_experts=12, num_layers=3, replication=2, seed=seed, epoch=1
    )
    transfers = old.transfers(new)
    for t in transfers:
        assert t.source in old.owners(t.layer, t.expert)
    for site in range(6):
        arrivals = old.arrivals(new, site)
        assert arrivals == tuple(t for t in transfers if t.target == site)
        for layer in range(3):
            came = {t.expert for t in arrivals if t.layer == layer}
            assert came == set(new.resident(layer, site)) - set(old.resident(layer, site))
    sends = Counter(t.source for t in transfers)
    assert max(sends.values()) - min(sends.values()) <= 3
    assert old.transfers(old) == ()


def test_from_table_takes_any_order() -> None:
    placement = Placement.from_table([[[1, 0], [2, 1], [0, 2]]])
    assert placement == Placement(
        num_sites=3,
        num_experts=3,
        num_layers=1,
        replication=2,
        table=(((0, 1), (1, 2), (0, 2)),),
    )


IMPOSSIBLE: list[tuple[tuple[Any, ...], str]] = [
    ((4, 8, 1, 5), r"replication must be in \[1, num_sites = 4\], got 5"),
    ((4, 6, 1, 1), r"got 6 \* 1 with 4 sites.*replication 2, 4 with 6 experts, or 4 or 8 experts"),
    ((3, 1, 1, 1), "or 3 experts with replication 1"),
    ((0, 4, 1, 1), "num_sites must be at least 1, got 0"),
    ((2, 0, 1, 1), "num_experts must be at least 1"),
    ((2, 4, 0, 1), "num_layers must be at least 1"),
    ((2, 4, 1, 0), "replication must be at least 1"),
    ((2, 4, 1, 1.0), "replication must be an int, got 1.0"),
    ((True, 4, 1, 1), "num_sites must be an int, got True"),
]


@pytest.mark.parametrize(("size", "message"), IMPOSSIBLE)
def test_impossible_sizes_are_refused(size: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement.cyclic(**named(size))
    with pytest.raises(ValueError, match=message):
        Placement.random(**named(size), seed=0)


BAD_TABLES: list[tuple[Any, str]] = [
    ([], "at least"),
    ([[]], "at least"),
    ([[[]]], "at least"),
    (3, "must be"),
    ([[0, 1]], "list of sites"),
    ([[["a"]]], "site numbers"),
    ([[[0], [0, 1]]], r"table\[0\]\[1\] must name replication = 1 sites"),
    ([[[0, 0], [1, 1]]], "without repeats"),
    ([[[0, 1], [-1, 1]]], r"must be sites in \[0, 2\)"),
    ([[[0], [0], [1]]], r"num_experts \* replication must be a multiple"),
    ([[[0], [0], [0], [1]]], r"hold 2 experts of layer 0, got \[3, 1\] at sites 0..1"),
    ([[[0], [1]], [[0]]], r"table\[1\] must have num_experts = 2"),
    ([[[0], [1.5]]], "."),
]


@pytest.mark.parametrize(("table", "message"), BAD_TABLES)
def test_bad_tables_are_refused(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement.from_table(table)


def test_questions_out_of_range_are_refused() -> None:
    placement = Placement.cyclic(num_sites=2, num_experts=4, num_layers=2, replication=1)
    for call, message in (
        (lambda: placement.owners(2, 0), r"layer must be in \[0, 2\), got 2"),
        (lambda: placement.owners(-1, 0), "layer"),
        (lambda: placement.owners(0, 4), r"expert must be in \[0, 4\), got 4"),
        (lambda: placement.resident(0, 2), r"site must be in \[0, 2\), got 2"),
        (lambda: placement.arrivals(placement, -1), "site"),
        (lambda: placement.num_shared(0, 2), "site"),
        (
            lambda: placement.transfers(
                Placement.cyclic(num_sites=2, num_experts=4, num_layers=2, replication=2)
            ),
            "same",
        ),
        (lambda: Placement.from_dict({}), "to_dict"),
        (lambda: Placement.from_dict({"owners": [[[0]]], "num_sites": 2}), "multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_values_of_other_types_are_named() -> None:
    size = {"num_sites": 2, "num_experts": 4, "num_layers": 2, "replication": 1}
    placement = Placement.cyclic(**size)
    for call, message in (
        (lambda: placement.resident("a", 0), "layer must be an int, got 'a'"),
        (lambda: placement.resident(0, None), "site must be an int, got None"),
        (lambda: placement.owners(0, 1.5), "expert must be an int, got 1.5"),
        (lambda: Placement.random(**size, seed="a"), "seed must be an int, got 'a'"),
        (lambda: Placement.random(**size, seed=0, epoch=None), "epoch must be an int, got None"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_needs_no_torch() -> None:
    program = (
        "import sys; import fomoe_ext.placement, fomoe_ext.placement.wire; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
