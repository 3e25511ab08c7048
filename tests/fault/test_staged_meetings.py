"""Meetings as two-phase commits: committed by all sites, or rolled back by all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from outer_model import SmallModel, bits, cyclic_placement
from sites import pool
from small_sync import make, take_steps

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync, staged
from fomoe_ext.outer.errors import MeetingLost
from fomoe_ext.outer.staged import Staged
from fomoe_ext.placement import wire


def all_bits(sync: OuterSync) -> list[bytes]:
    """Everything that a meeting may change."""
    tensors = [p.detach() for p in sync.model.parameters()]
    tensors += sync.state.anchors + sync.state.momenta
    tensors += [v for f in sync.state.feedback for v in (f.own, f.shares) if v is not None]
    tensors += [piece.values() for layout in sync.layout.bias_layouts for piece in layout.pieces]
    return [bits(tensor.clone()) for tensor in tensors]


def staged_and_not(site: int, num_sites: int, options: dict[str, Any]) -> None:
    plain = make(site, num_sites, **options)
    two_phase = make(site, num_sites, staged=True, **options)
    for index in range(3):
        for model, inner, sync in (plain, two_phase):
            take_steps(model, inner, site, index)
            wanted = sync.predicted_bytes()
            report = sync.step()
            assert report.bytes_sent == wanted
            assert report.seconds >= report.exchange_s > 0
        assert all_bits(plain[2]) == all_bits(two_phase[2])
    sent = two_phase[2].bytes_sent - plain[2].bytes_sent
    assert sent == 3 * (num_sites - 1) * wire.COMMIT_BYTES


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "diloco", "codec": "int4"},
        {"optimizer": "fedavg", "codec": "topk", "scope": "resident"},
        {"optimizer": "local-adamw", "codec": "int8", "moment_periods": (1, 2)},
        {"optimizer": "diloco", "codec": "fp32", "bucket_bytes": 4 * 787},
    ],
)
def test_a_staged_meeting_gives_the_same_bits(options: dict[str, Any]) -> None:
    pool().run(3, staged_and_not, options)


def broken_off(site: int, num_sites: int, where: str) -> list[bytes]:
    """A meeting that fails at one site is rolled back and repeated. Returns the resulting state."""
    model, inner, sync = make(site, num_sites, codec="int4", staged=True)
    take_steps(model, inner, site, 0)
    sync.step()
    take_steps(model, inner, site, 1)
    before, sent = all_bits(sync), sync.bytes_sent
    if where:
        module, name = {"exchange": (staged, "exchange"), "commit": (Staged, "end_pending")}[where]
        right = getattr(module, name)

        def wrong(*args: Any, **more: Any) -> Any:
            if where == "exchange":
                right(*args, **more)
            raise RuntimeError("gloo: connection closed")

        setattr(module, name, wrong)
        try:
            with pytest.raises(MeetingLost, match="connection closed"):
                sync.step()
        finally:
            setattr(module, name, right)
        assert sync.round == 1 and sync.bytes_sent == sent
        assert sync.end_pending(commit=False) is None
        assert all_bits(sync) == before
        assert sync.end_pending(commit=False) is None  # there is none any more
    sync.step()
    assert sync.round == 2
    return all_bits(sync)


def test_a_meeting_that_broke_off_is_rolled_back_and_repeated() -> None:
    straight = pool().run(3, broken_off, "")
    assert pool().run(3, broken_off, "exchange") == straight
    assert pool().run(3, broken_off, "commit") == straight


def applied_by_some(site: int, num_sites: int) -> list[bytes]:
    """Site 0 has committed; at the others the meeting failed after everything had arrived."""
    model, inner, sync = make(site, num_sites, codec="int4", staged=True)
    take_steps(model, inner, site, 0)
    right = Staged.end_pending
    if site:
        Staged.end_pending = lambda *args, **more: (_ for _ in ()).throw(RuntimeError("gloo"))
    try:
        if site:
            with pytest.raises(MeetingLost):
                sync.step()
        else:
            sync._driver.compare = lambda: None  # the others do not come to compare
            sync.step()
    finally:
        Staged.end_pending = right
    if site:
        assert sync.pending is not None and sync.pending.arrived
        report = sync.end_pending(commit=True)
        assert report is not None and report.round == 1
    assert sync.round == 1
    sync.verify()
    return all_bits(sync)


def test_a_meeting_that_one_site_has_committed_can_be_committed_by_all() -> None:
    straight = pool().run(3, _one_meeting)
    assert pool().run(3, applied_by_some) == straight


def _one_meeting(site: int, num_sites: int) -> list[bytes]:
    model, inner, sync = make(site, num_sites, codec="int4", staged=True)
    take_steps(model, inner, site, 0)
    sync.step()
    return all_bits(sync)


def not_arrived(site: int, num_sites: int) -> str:
    model, inner, sync = make(site, num_sites, staged=True)
    take_steps(model, inner, site, 0)
    right = staged.exchange
    staged.exchange = lambda *args, **more: (_ for _ in ()).throw(RuntimeError("gloo"))
    try:
        with pytest.raises(MeetingLost):
            sync.step()
    finally:
        staged.exchange = right
    with pytest.raises(ValueError, match="part of the pending meeting has not arrived") as caught:
        sync.end_pending(commit=True)
    sync.end_pending(commit=False)
    return str(caught.value)


def test_an_incomplete_meeting_cannot_be_committed() -> None:
    pool().run(2, not_arrived)


def nan_everywhere(site: int, num_sites: int) -> None:
    model, inner, sync = make(site, num_sites, staged=True)
    take_steps(model, inner, site, 0)
    with torch.no_grad():
        if site == 1:
            model.first[0, 0] = float("nan")
    before = all_bits(sync)
    with pytest.raises(MeetingError, match="site 1: the value of first is NaN") as caught:
        sync.step()
    assert not isinstance(caught.value, MeetingLost)
    assert all_bits(sync) == before and sync.pending is None


def test_a_refused_staged_meeting_changes_nothing() -> None:
    pool().run(2, nan_everywhere)


def test_staged_is_refused_where_meetings_are_spread_over_a_round() -> None:
    placement = cyclic_placement(1, 1)
    for options in ({"optimizer": "ddp"}, {"fragments": 2, "local_steps": 4}):
        with pytest.raises(ValueError, match="staged needs fragments = 1"):
            OuterSync(SmallModel(placement, 0), placement, 0, OuterOptions(staged=True, **options))
