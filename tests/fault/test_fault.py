"""Sites that come and go: the parts. Whole jobs with faults are in tests/chaos."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outer_model import EXPERTS, LAYERS, SmallModel, bits, give_gradients
from sites import pool
from torch import Tensor

from fomoe_ext.config.fault import FaultConfig
from fomoe_ext.config.job import preset_config
from fomoe_ext.fault import lighthouse, ownership, secret
from fomoe_ext.fault.membership import read_current
from fomoe_ext.fault.shadows import Shadows
from fomoe_ext.launch import inject
from fomoe_ext.launch.inject import Fault
from fomoe_ext.launch.waiting import GivenUp, wait_for, watched
from fomoe_ext.outer import MeetingError, OuterSync, staged
from fomoe_ext.outer.belongings import Belongings, biases_of, items_of, ship
from fomoe_ext.outer.errors import MeetingLost
from fomoe_ext.outer.reduce import Damaged
from fomoe_ext.outer.staged import Staged
from fomoe_ext.placement import Placement, wire
from fomoe_ext.plan.memory import job_memory

# --------------------------------------------------------------------------- meetings in two phases


def make(
    site: int, num_sites: int, scope: str = "global", **options: Any
) -> tuple[SmallModel, torch.optim.Optimizer, OuterSync]:
    placement = Placement.cyclic(num_sites, EXPERTS, LAYERS, 2)
    model = SmallModel(placement, site, scope, balance="bias", bias_update_rate=0.01)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(model, placement, site, inner_optimizer=inner, **options)
    return model, inner, sync


def take_steps(model: SmallModel, inner: torch.optim.Optimizer, site: int, index: int) -> None:
    for step in range(2):
        give_gradients(model, site, 2 * index + step)
        inner.step()


def all_bits(sync: OuterSync) -> list[bytes]:
    """Everything that a meeting may change."""
    tensors = [p.detach() for p in sync.model.parameters()]
    tensors += sync.anchors + sync.momenta
    tensors += [v for f in sync.feedback for v in (f.own, f.shares) if v is not None]
    tensors += [piece.values() for layout in sync.layout.bias_layouts for piece in layout.pieces]
    return [bits(tensor.clone()) for tensor in tensors]


def staged_and_not(site: int, num_sites: int, options: dict[str, Any]) -> None:
    plain = make(site, num_sites, **options)
    two_phase = make(site, num_sites, staged=True, **options)
    for index in range(3):
        for model, inner, sync in (plain, two_phase):
            take_steps(model, inner, site, index)
            wanted = sync.predicted_bytes()
            assert sync.step().bytes_sent == wanted
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
    """A meeting that fails at one site, taken back and held again; what all have then."""
    model, inner, sync = make(site, num_sites, codec="int4", staged=True)
    take_steps(model, inner, site, 0)
    sync.step()
    take_steps(model, inner, site, 1)
    before, sent = all_bits(sync), sync.bytes_sent
    if where:
        module, name = {"exchange": (staged, "exchange"), "settle": (Staged, "settle")}[where]
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
        assert sync.settle(apply=False) is None
        assert all_bits(sync) == before
        assert sync.settle(apply=False) is None  # there is none any more
    sync.step()
    assert sync.round == 2
    return all_bits(sync)


def test_a_meeting_that_broke_off_is_taken_back_and_held_again() -> None:
    straight = pool().run(3, broken_off, "")
    assert pool().run(3, broken_off, "exchange") == straight
    assert pool().run(3, broken_off, "settle") == straight


def applied_by_some(site: int, num_sites: int) -> list[bytes]:
    """Site 0 has applied; the others have heard of a failure after everything had arrived."""
    model, inner, sync = make(site, num_sites, codec="int4", staged=True)
    take_steps(model, inner, site, 0)
    right = Staged.settle
    if site:
        Staged.settle = lambda *args, **more: (_ for _ in ()).throw(RuntimeError("gloo"))
    try:
        if site:
            with pytest.raises(MeetingLost):
                sync.step()
        else:
            sync._driver.compare = lambda: None  # the others do not come to compare
            sync.step()
    finally:
        Staged.settle = right
    if site:
        assert sync.pending is not None and sync.pending.arrived
        report = sync.settle(apply=True)
        assert report is not None and report.round == 1
    assert sync.round == 1
    sync.verify()
    return all_bits(sync)


def test_what_some_have_applied_all_can_apply() -> None:
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
    with pytest.raises(ValueError, match="not all of the pending meeting has arrived") as caught:
        sync.settle(apply=True)
    sync.settle(apply=False)
    return str(caught.value)


def test_what_has_not_arrived_cannot_be_applied() -> None:
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
    placement = Placement.cyclic(1, EXPERTS, LAYERS, 1)
    for options in ({"optimizer": "ddp"}, {"fragments": 2, "local_steps": 4}):
        with pytest.raises(ValueError, match="staged, site_mean = tokens and clip_delta need"):
            OuterSync(SmallModel(placement, 0), placement, 0, staged=True, **options)


# ------------------------------------------------------------------------------- who holds what


@st.composite
def holdings_and_more(draw: st.DrawFn) -> tuple[list[list[list[int]]], int, int]:
    """What 1 to 5 sites hold of 1 to 3 layers, some of it nowhere; experts; replication."""
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


def test_orphans_go_to_who_has_a_copy() -> None:
    holdings = [[[0, 1]], [[2]], [[3, 4, 5]]]
    placement = ownership.adopt_orphans(holdings, 8, {(0, 6): 2})
    assert placement.owners(0, 6) == (2,) and placement.owners(0, 7) == (1,)


@given(holdings_and_more())
def test_experts_are_shared_out_evenly_with_few_moves(
    given_: tuple[list[list[list[int]]], int, int],
) -> None:
    holdings, experts, replication = given_
    if ownership.orphans(holdings, experts):
        with pytest.raises(ValueError, match="holdings must have all experts"):
            ownership.rebalance(holdings, experts, replication)
        return
    placement = ownership.rebalance(holdings, experts, replication)
    assert ownership.is_level(placement, replication)
    # A level placement is left as it is.
    level = [
        [list(placement.resident(layer, site)) for layer in range(placement.num_layers)]
        for site in range(placement.num_sites)
    ]
    assert ownership.rebalance(level, experts, replication) == placement


def test_after_a_death_only_what_is_missing_moves() -> None:
    whole = Placement.cyclic(4, 16, 2, 2)
    left = [[list(whole.resident(layer, s)) for layer in range(2)] for s in (0, 1, 3)]
    placement = ownership.rebalance(left, 16, 2)
    moved = sum(
        len(held_by(placement, site)[layer] - set(left[site][layer]))
        for site in range(3)
        for layer in range(2)
    )
    assert moved <= 2 * (8 + 2)  # the dead one's eight of each layer, and a few to make it even
    assert not placement.even and Placement.from_dict(placement.to_dict()) == placement


def test_a_site_that_comes_takes_from_the_fullest() -> None:
    left = ownership.rebalance([[[0, 1, 2, 3]], [[4, 5, 6, 7]]], 8, 1)
    holdings = [[list(left.resident(0, s))] for s in range(2)] + [[[]]]
    placement = ownership.rebalance(holdings, 8, 1)
    assert sorted(len(placement.resident(0, s)) for s in range(3)) == [2, 3, 3]
    for site in range(2):
        assert set(placement.resident(0, site)) <= set(holdings[site][0])


# ------------------------------------------------------------------------- belongings and shadows


def moved_over(site: int, num_sites: int) -> None:
    """An expert of site 0 goes to site 2 with all that belongs to it."""
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

    table = [[list(o) for o in layer] for layer in old.owners_of]
    table[0][item[1]] = [*old.owners(*item), target]
    new = Placement.uneven(table, num_sites)
    model2 = SmallModel(new, site, "resident", balance="bias", bias_update_rate=0.01)
    inner2 = torch.optim.AdamW(model2.parameters(), lr=0.05)
    sync2 = OuterSync(
        model2, new, site, inner_optimizer=inner2, groups=sync.groups, arriving=True, codec="int4"
    )
    wanted = items_of(sync2.layout)
    for found, vector in arrived.items():
        mine.take(vector, wanted[found], biases_of(sync2.layout)[found], mine.names())
    mine.fill(sync2.state)
    sync2.round = sync.round
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
    placement = Placement.cyclic(num_sites, EXPERTS, LAYERS, 1)
    model = SmallModel(placement, site, scope, balance="bias", bias_update_rate=0.01)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(model, placement, site, inner_optimizer=inner, optimizer=optimizer)
    take_steps(model, inner, site, 0)
    sync.step()
    shadows = Shadows()
    sent = shadows.refresh(sync)
    expert = sum(p.numel for p in items_of(sync.layout)[0, placement.resident(0, site)[0]])
    row = model.layers[0].router.weight.shape[1]
    sizes = wire.Sizes(0, 0, expert - (row if scope == "resident" else 0), row)
    elements = wire.shadow_elements(
        sizes, router_scope=scope, selection_bias=True, outer_momentum=bool(sync.momenta)
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
    placement = Placement.cyclic(3, EXPERTS, LAYERS, 1)
    sites = pool().run(3, kept_shadows, scope, optimizer)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            (owner,) = placement.owners(layer, expert)
            keeper = wire.shadow_site(placement, layer, expert)
            assert keeper is not None and keeper != owner
            assert sites[keeper]["kept"][layer, expert] == sites[owner]["held"][layer, expert]
    assert sum(len(site["kept"]) for site in sites) == LAYERS * EXPERTS


def test_what_all_hold_has_no_shadow() -> None:
    placement = Placement.cyclic(2, 4, 1, 2)
    assert wire.shadow_site(placement, 0, 0) is None
    assert wire.shadow_parcels(placement) == []


# ------------------------------------------------------------------------------------ the rest


class _Work:
    def __init__(self, looks: int) -> None:
        self.looks, self.waited = looks, False

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.waited = True


def test_a_wait_is_given_up_when_the_watch_says_so() -> None:
    work = _Work(10**9)
    reasons = iter(["", "", "site 3 is silent"])
    with watched(lambda: next(reasons)), pytest.raises(GivenUp, match="site 3 is silent"):
        wait_for(work)
    assert not work.waited
    work = _Work(3)
    with watched(lambda: ""):
        wait_for(work)
    assert work.waited
    work = _Work(10**9)
    wait_for(work)  # nobody watches: it is the work that waits
    assert work.waited


def test_scripts_of_faults() -> None:
    script = "kill 2 at 3 reduce, stop 1 at 4 local for 2.5\nfull 0 at 1 checkpoint\n"
    faults = inject.parse(script)
    assert faults == [
        Fault("kill", 2, 3, "reduce"),
        Fault("stop", 1, 4, "local", 2.5),
        Fault("full", 0, 1, "checkpoint"),
    ]
    assert inject.parse(", ".join(map(str, faults))) == faults
    for bad in ("kill 2", "burn 2 at 3 local", "kill 2 at 3 tea", "stop 1 at 2 local during 3"):
        with pytest.raises(ValueError, match=f"fault {bad!r}"):
            inject.parse(bad)


def test_a_secret_changes_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOMOE_SECRET", raising=False)
    open_ = secret.keyed("member", 1)
    monkeypatch.setenv("FOMOE_SECRET", "long enough to be a secret")
    assert secret.keyed("member", 1) != open_
    assert secret.matches(secret.keyed("member", 1), "member", 1)
    assert not secret.matches(open_, "member", 1)
    assert not secret.matches(secret.keyed("member", 2), "member", 1)
    monkeypatch.setenv("FOMOE_SECRET", "short")
    with pytest.raises(ValueError, match="at least 16 characters, got 5"):
        secret.own_secret()


def test_other_interfaces_than_loopback_need_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FOMOE_SECRET", raising=False)
    for host in ("127.0.0.1", "::1", "localhost"):
        lighthouse.require_secret(host)
    for host in ("0.0.0.0", "192.168.1.5", "lighthouse.example"):
        with pytest.raises(ValueError, match="FOMOE_SECRET"):
            lighthouse.require_secret(host)
    monkeypatch.setenv("FOMOE_SECRET", "long enough to be a secret")
    lighthouse.require_secret("0.0.0.0")
    monkeypatch.delenv("FOMOE_SECRET")
    pytest.importorskip("torchft")
    assert lighthouse.main(["--bind", "0.0.0.0:0"]) == 2
    assert "FOMOE_SECRET" in capsys.readouterr().err


def test_a_view_that_is_none_is_refused() -> None:
    assert read_current(b'{"name": "1.2.1-1", "members": [0, 3]}', 4) == ("1.2.1-1", (0, 3))
    for raw in (
        b"",
        b"[]",
        b'{"name": "1.2"}',
        b'{"name": "", "members": [0]}',
        b'{"name": "1.2", "members": [4]}',
        b'{"name": "1.2", "members": [true]}',
        b'{"name": "1.2", "members": "0"}',
        b'{"name": "' + b"1" * (1 << 20) + b'", "members": [0]}',
    ):
        with pytest.raises(ValueError):
            read_current(raw, 4)


def test_what_a_tolerant_job_cannot_do_is_said() -> None:
    config = preset_config("tiny")
    fault = FaultConfig(membership="torchft")
    dataclasses.replace(config, fault=fault)
    for section, changes, wanted in (
        ("outer", {"optimizer": "ddp"}, "not ddp"),
        ("outer", {"fragments": 2}, "fragments = 1"),
        ("sites", {"ranks_per_site": 2}, "ranks_per_site = 1"),
        ("run", {"probe_tokens": 64}, "probe_tokens = 0"),
    ):
        part = dataclasses.replace(getattr(config, section), **changes)
        with pytest.raises(ValueError, match=f"membership = torchft needs .*{wanted}"):
            dataclasses.replace(config, fault=fault, **{section: part})
    with pytest.raises(ValueError, match=r"quorum must be at most sites\.sites = 4, got 5"):
        dataclasses.replace(config, fault=FaultConfig(membership="torchft", quorum=5))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"quorum": 0}, "quorum"),
        ({"silent_s": 0.0}, "silent_s"),
        ({"grace": -1.0}, "grace"),
        ({"restarts": 2}, "restarts need"),
        ({"shadow_experts": True}, "shadow_experts needs"),
        ({"lighthouse": "a:1"}, "lighthouse"),
    ],
)
def test_bad_fault_options(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        FaultConfig(**changes)


def test_the_plan_counts_what_a_tolerant_job_sends() -> None:
    from fomoe_ext.plan import traffic as plan

    config = preset_config("tiny")
    tolerant = dataclasses.replace(
        config, fault=FaultConfig(membership="torchft", shadow_experts=True)
    )
    placement = plan.job_placement(config)
    more = plan.meeting_bytes(tolerant, placement, 0) - plan.meeting_bytes(config, placement, 0)
    assert more == 3 * wire.COMMIT_BYTES
    assert plan.shadow_bytes(config, placement, 0) == 0
    assert plan.shadow_bytes(tolerant, placement, 0) > 0
    kept = [job_memory(c, placement, 0) for c in (config, tolerant)]
    assert kept[0].shadow_copies == 0
    assert kept[1].total - kept[0].total == kept[1].shadow_copies > 0
