"""What makes a placement balanced."""

from __future__ import annotations

from collections import Counter

from fomoe_ext.placement import Placement


def check_load(placement: Placement) -> None:
    """The definition: sizes, distinct sites, the same number of experts for every site."""
    assert len(placement.table) == placement.num_layers
    for experts in placement.table:
        assert len(experts) == placement.num_experts
        held = Counter(site for owners in experts for site in owners)
        assert all(len(set(owners)) == placement.replication for owners in experts)
        expected = placement.num_experts * placement.replication // placement.num_sites
        assert held == dict.fromkeys(range(placement.num_sites), expected)
