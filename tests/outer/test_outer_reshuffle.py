"""Reshuffles: weights follow the expert, optimizer state follows or is reset, and the learning rate
of new experts warms up.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from outer_model import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SIZE,
    SmallModel,
    assert_same_bits,
    bits,
    cyclic_placement,
    give_gradients,
    noise,
    pieces,
    random_placement,
)
from sites import pool
from torch import Tensor, nn

from fomoe_ext.config.inner import InnerConfig
from fomoe_ext.config.io import parse_args
from fomoe_ext.config.model import expert_parameters
from fomoe_ext.outer import OuterOptions, OuterSync
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.outer.inner_state import move_state_rows
from fomoe_ext.outer.optimizer import MOMENTS
from fomoe_ext.outer.warmup import ArrivalWarmup
from fomoe_ext.placement import Placement, wire
from fomoe_ext.plan.traffic import job_placement, moved_bytes

SINGLE = cyclic_placement(1, 1)


def drawn(num_sites: int, replication: int, epoch: int) -> Placement:
    return random_placement(num_sites, replication, seed=3, epoch=epoch)


def one_round(model: nn.Module, sync: OuterSync, site: int, index: int) -> None:
    give_gradients(model, site, index)
    if sync.layout.site.rule.name == "ddp":
        sync.reduce_gradients()
    sync.inner_optimizer.step()
    sync.step()


def set_biases(model: SmallModel, site: int) -> None:
    for layer in model.layers:
        layer.router.selection_bias.copy_(noise(("bias", site, layer.layer_index), EXPERTS))


def biases(model: SmallModel) -> list[Tensor]:
    return [layer.router.selection_bias.clone() for layer in model.layers]


def momentum_of(sync: OuterSync) -> dict[str, Tensor]:
    return {
        piece.key: momentum[place].clone()
        for layout, momentum in zip(sync.layout.layouts, sync.state.momenta, strict=False)
        for piece, place in layout.slices()
    }


def reshuffle_once(
    site: int, num_sites: int, replication: int, scope: str, optimizer: str, moments: str
) -> dict[str, Any]:
    old, new = drawn(num_sites, replication, 0), drawn(num_sites, replication, 1)
    model = SmallModel(old, site, scope, balance="bias", expert_bias=True)
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(
        model,
        old,
        site,
        OuterOptions(optimizer=optimizer, bucket_bytes=3000),
        inner_optimizer=inner,
    )
    set_biases(model, site)
    predicted = sync.predicted_bytes()
    one_round(model, sync, site, 0)
    assert sync.bytes_sent == predicted
    result: dict[str, Any] = {
        "before": pieces(model),
        "biases_before": biases(model),
        "momentum_before": momentum_of(sync),
        "moments_before": {m: pieces(model, lambda p, m=m: inner.state[p][m]) for m in MOMENTS},
    }
    parameters = list(model.parameters())
    report = sync.reshuffle(new, warmup_steps=4, moments=moments)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert sync.placement == new
    for index, layer in enumerate(model.layers):
        assert layer.experts.resident_experts == new.resident(index, site)
        assert layer.experts.expand_weight.grad is None
    sync.verify()
    result |= {
        "report": report,
        "after": pieces(model),
        "biases": biases(model),
        "momentum": momentum_of(sync),
        "moments": {m: pieces(model, lambda p, m=m: inner.state[p][m]) for m in MOMENTS},
        "progress": dict(sync.warmup.progress),
    }
    # The next round must work in the new groups, from an anchor that followed.
    one_round(model, sync, site, 1)
    sync.verify()
    return result | {"next": pieces(model)}


CASES = [
    (num_sites, replication, scope, optimizer, "reset")
    for num_sites, replication in ((2, 1), (3, 2), (4, 2), (4, 3))
    for scope, optimizer in (
        ("global", "diloco"),
        ("resident", "diloco"),
        ("resident", "local-adamw"),
        ("resident", "ddp"),
        ("global", "ddp"),
    )
]
CASES += [
    (2, 1, "global", "diloco", "carry"),
    (3, 2, "resident", "diloco", "carry"),
    (4, 2, "resident", "local-adamw", "carry"),
    (3, 2, "resident", "ddp", "carry"),
    (4, 3, "global", "fedavg", "carry"),
]


@pytest.mark.parametrize(("num_sites", "replication", "scope", "optimizer", "moments"), CASES)
def test_content_follows_the_expert(
    num_sites: int, replication: int, scope: str, optimizer: str, moments: str
) -> None:
    answers = pool().run(num_sites, reshuffle_once, replication, scope, optimizer, moments)
    old, new = drawn(num_sites, replication, 0), drawn(num_sites, replication, 1)
    assert old.transfers(new)
    before = [answer["before"] for answer in answers]
    for site, answer in enumerate(answers):
        arrivals = {(t.layer, t.expert): t.source for t in old.arrivals(new, site)}
        assert answer["report"].arrived == tuple(sorted(arrivals))
        assert answer["progress"] == dict.fromkeys(arrivals, (0, 4))
        for key, got in answer["after"].items():
            holder = site if key in before[site] else old.owners(key[1], key[2])[0]
            moved = key[0] == "expert" and (key[1], key[2]) in arrivals
            if scope == "resident" and key[0] == "router" and (key[1], key[2]) in arrivals:
                moved, holder = True, old.owners(key[1], key[2])[0]
            assert bits(got) == bits(before[holder][key]), (site, key)
            for moment in MOMENTS:
                state = answer["moments"][moment][key]
                if moved and moments == "carry":
                    sender = answers[arrivals[key[1], key[2]]]["moments_before"][moment][key]
                    assert sender.any() and bits(state) == bits(sender), (site, key, moment)
                elif moved:
                    assert not state.any(), (site, key, moment)
                else:
                    assert bits(state) == bits(answer["moments_before"][moment][key])
        for layer, expert in arrivals:
            holder = old.owners(layer, expert)[0] if scope == "resident" else site
            wanted = answers[holder]["biases_before"][layer][expert]
            assert answer["biases"][layer][expert] == wanted
        for key, got in answer["momentum"].items():
            holders = [a["momentum_before"] for a in answers if key in a["momentum_before"]]
            assert bits(got) == bits(holders[0][key]), (site, key)
    assert_same_bits([answer["after"] for answer in answers], new, scope)
    assert_same_bits([answer["next"] for answer in answers], new, scope)
    check_bytes(answers, old, new, scope, optimizer, 2 if moments == "carry" else 0)


def check_bytes(
    answers: list[Any],
    old: Placement,
    new: Placement,
    scope: str,
    optimizer: str,
    inner_moments: int,
) -> None:
    expert = 3 * SIZE * HIDDEN + 2 * SIZE + HIDDEN  # matrices and biases
    sizes = wire.Sizes(outside=0, block=0, expert=expert, router_row=HIDDEN)
    for site, answer in enumerate(answers):
        sent = wire.reshuffle_bytes(
            old,
            new,
            site,
            sizes,
            optimizer=optimizer,
            router_scope=scope,
            selection_bias=True,
            inner_moments=inner_moments,
        )
        assert answer["report"].bytes_sent == sent
        floats = expert + (HIDDEN if scope == "resident" else 0)
        floats *= (2 if optimizer == "diloco" else 1) + inner_moments
        floats += scope == "resident"
        moves = sum(t.source == site for t in old.transfers(new))
        assert sent == (old.num_sites - 1) * 128 + 4 * moves * floats


# ---- moments that go along -----------------------------------------------------------------------


def swapped(placement: Placement) -> Placement:
    """A placement in which two sites have swapped all experts."""
    table = [[[1 - s for s in owners] for owners in experts] for experts in placement.table]
    return Placement.from_table(table, 2)


def train_experts(site: int, num_sites: int, moments: str | None) -> list[float]:
    """Losses of 2 x 3 rounds in which only experts are trained. In the middle the sites swap
    experts and data; with `moments` None they do not.
    """
    placement = cyclic_placement(num_sites, 1)
    model, stream, losses = SmallModel(placement, site), site, []
    experts = [p for layer in model.layers for p in layer.experts.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in experts))
    inner = torch.optim.AdamW(experts, lr=0.05)
    sync = OuterSync(
        model, placement, site, OuterOptions(optimizer="fedavg"), inner_optimizer=inner
    )
    for step in range(18):
        x, y = noise(("x", stream, step), 20, HIDDEN), noise(("y", stream, step), 20, 3)
        loss = (model(x) - y).square().mean()
        loss.backward()
        inner.step()
        inner.zero_grad()
        losses.append(loss.item())
        if step % 3 == 2:
            sync.step()
        if step == 8 and moments is not None:
            report = sync.reshuffle(swapped(placement), moments=moments)
            assert len(report.arrived) == LAYERS * EXPERTS // 2
            assert sync.warmup.progress == {}
            stream = 1 - stream
    return losses


def test_training_goes_on_as_if_no_expert_had_moved() -> None:
    """All experts and the data are swapped: each site has the losses of the other, bit for bit."""
    kept, carried, reset = (pool().run(2, train_experts, m) for m in (None, "carry", "reset"))
    assert kept[0] != kept[1]
    for site in range(2):
        assert carried[site] == kept[site][:9] + kept[1 - site][9:]
        # The first loss is with the same weights, later ones differ by the missing moments.
        assert reset[site][:10] == carried[site][:10]
        assert all(a != b for a, b in zip(reset[site][10:], carried[site][10:], strict=True))


def refused_carry(site: int, num_sites: int) -> list[str]:
    old, new = drawn(num_sites, 1, 0), drawn(num_sites, 1, 1)
    model = SmallModel(old, site)
    inner = torch.optim.AdamW(model.parameters())
    sync = OuterSync(model, old, site, inner_optimizer=inner)
    messages = []

    def ask(moments: str) -> None:
        with pytest.raises(MeetingError) as caught:
            sync.reshuffle(new, moments=moments)
        messages.append(str(caught.value))

    if site == 0:
        give_gradients(model, site, 0)
        inner.step()
    ask("carry")
    give_gradients(model, site, 0)
    inner.step()
    ask("carry" if site else "reset")
    assert sync.placement == old
    sync.reshuffle(new, moments="carry")
    assert sync.placement == new
    return messages


def test_carrying_missing_state_is_refused_by_all() -> None:
    for messages in pool().run(2, refused_carry):
        assert "comes after an optimizer step, but at site 1 layers.0.experts." in messages[0]
        assert "the same placement to reshuffle, and the same moments" in messages[1]
    model = SmallModel(SINGLE, 0)
    inner = torch.optim.SGD(model.parameters(), lr=1)
    sync = OuterSync(model, SINGLE, 0, inner_optimizer=inner)
    with pytest.raises(ValueError, match=r"reshuffle with moments 'carry' needs .* got SGD"):
        sync.reshuffle(SINGLE, moments="carry")
    with pytest.raises(ValueError, match="moments must be one of"):
        sync.reshuffle(SINGLE, moments="keep")


def test_a_job_warms_up_only_state_that_was_reset() -> None:
    flags = ["--placement", "random", "--reshuffle-rounds", "2", "--reshuffle-moments", "carry"]
    assert parse_args(flags).sites.resolved_warmup == 0
    assert parse_args([*flags, "--reshuffle-warmup", "3"]).sites.resolved_warmup == 3
    assert parse_args(flags[:4]).sites.resolved_warmup == 8
    with pytest.raises(ValueError, match=r"carry needs inner\.inner_optimizer = adamw"):
        dataclasses.replace(parse_args(flags), inner=InnerConfig(inner_optimizer="sgd"))
    reset = dataclasses.replace(parse_args(flags), sites=parse_args(flags[:4]).sites)
    old, new = job_placement(reset), job_placement(reset, 1)
    moved = sum(t.source == 0 for t in old.transfers(new))
    # With router_scope "resident" an expert's router row moves with it.
    assert reset.model.router_scope == "resident"
    elements = expert_parameters(reset.model) + reset.model.hidden_size
    more = moved_bytes(parse_args(flags), old, new, 0) - moved_bytes(reset, old, new, 0)
    assert more == 4 * 2 * moved * elements > 0


# ---- the warm-up ---------------------------------------------------------------------------------


def reshuffle_twice(site: int, num_sites: int) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """During a warm-up of 5 steps: two steps, then another reshuffle, then one step."""
    placements = [drawn(num_sites, 2, epoch) for epoch in range(3)]
    model = SmallModel(placements[0], site)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = OuterSync(
        model, placements[0], site, OuterOptions(optimizer="fedavg"), inner_optimizer=inner
    )
    sync.reshuffle(placements[1], warmup_steps=5)
    for step in range(2):
        give_gradients(model, site, step)
        inner.step()
    sync.step()
    sync.reshuffle(placements[2], warmup_steps=5)
    before = pieces(model)
    give_gradients(model, site, 2)
    gradients = pieces(model, lambda p: p.grad)
    inner.step()
    after = pieces(model)
    return {k: (before[k] - after[k]) / (0.1 * gradients[k]) for k in after}, gradients


def test_the_learning_rate_of_arrived_experts_warms_up() -> None:
    """Shares of the full SGD step: 1/5 new, 3/5 arrived one reshuffle ago, 1 otherwise."""
    placements = [drawn(3, 2, epoch) for epoch in range(3)]
    seen = set()
    for site, (shares, gradients) in enumerate(pool().run(3, reshuffle_twice)):
        for key, share in shares.items():
            wanted = 1.0
            if key[0] == "expert":
                layer, expert = key[1:3]
                held = [site in p.owners(layer, expert) for p in placements]
                if not held[1]:
                    wanted = 1 / 5
                elif not held[0]:
                    wanted = 3 / 5
            seen.add(wanted)
            big = gradients[key].abs() > 0.3
            assert torch.allclose(share[big], torch.tensor(wanted), atol=1e-4), (site, key)
    assert seen == {1 / 5, 3 / 5, 1.0}


def test_warmup_is_a_smaller_learning_rate_and_ends() -> None:
    """AdamW with weight decay: rows in warm-up step with lr i / W, all others with the full lr."""
    steps = 4
    placement = cyclic_placement(1, 1)
    model, twin = SmallModel(placement, 0), SmallModel(placement, 0)
    options = {"lr": 0.02, "weight_decay": 0.3}
    inner = torch.optim.AdamW(model.parameters(), **options)
    warmup = ArrivalWarmup(inner, list(model.layers))
    warmup.start([(1, 2)], steps)
    for step in range(steps + 2):
        share = min(1.0, (step + 1) / steps)
        other = torch.optim.AdamW(twin.parameters(), **options)
        other.load_state_dict(copy.deepcopy(inner.state_dict()))
        twin.load_state_dict(model.state_dict())
        before = pieces(model)
        for each in (model, twin):
            give_gradients(each, 0, step)
        inner.step()
        other.step()
        full = pieces(twin)
        for key, got in pieces(model).items():
            if key[:3] == ("expert", 1, 2):
                wanted = before[key] + share * (full[key] - before[key])
                assert torch.allclose(got, wanted, atol=1e-7), step
                assert share == 1 or not torch.equal(got, full[key])
            else:
                assert bits(got) == bits(full[key])
    assert warmup.progress == {}
    warmup.start([(0, 0)], 1)
    assert warmup.progress == {}


def test_state_rows_move_and_counters_stay() -> None:
    parameter = nn.Parameter(noise("p", 3, 2))
    inner = torch.optim.AdamW([parameter])
    parameter.grad = noise("g", 3, 2)
    inner.step()
    state = inner.state[parameter]
    old = {m: state[m].clone() for m in MOMENTS}
    move_state_rows(inner, parameter, [2, None, 0])
    for moment in MOMENTS:
        assert torch.equal(state[moment][0], old[moment][2])
        assert torch.equal(state[moment][2], old[moment][0])
        assert not state[moment][1].any()
    assert state["step"] == 1
