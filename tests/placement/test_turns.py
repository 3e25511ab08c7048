"""Experts that take turns: who meets when, what the others keep, and the bytes of it."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from outer_model import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SIZE,
    SmallModel,
    bits,
    contributors,
    give_gradients,
    noise,
    pieces,
    receivers,
)
from sites import pool
from torch import Tensor

from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync
from fomoe_ext.outer.turns import TurnLayout
from fomoe_ext.placement import Placement, wire
from fomoe_ext.placement.turns import ORDERS, GroupExperts, experts_of_turn, turn_size
from fomoe_ext.placement.wire import GroupElements

ROUNDS, STEPS = 7, 2


def place(num_sites: int, replication: int = 2) -> Placement:
    return Placement.cyclic(
        num_sites=num_sites, num_experts=EXPERTS, num_layers=LAYERS, replication=replication
    )


# ------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(("count", "turns"), [*product([0, 1, 3, 8, 24], [1, 2, 3, 5, 30])])
def test_a_cycle_is_all_experts_in_even_parts(count: int, turns: int) -> None:
    for begin in (1, 1 + 4 * turns):
        sizes = [turn_size(count, turns, begin + turn) for turn in range(turns)]
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_who_goes_first() -> None:
    """Tokens count by round since an expert last met, those that have met in the cycle go last."""
    tokens = {(0, 0): 5.0, (0, 1): 1.0, (1, 0): 3.0, (1, 1): 9.0}

    def of(order: str, round_index: int, **met: int) -> list[tuple[int, int]]:
        last = lambda expert: met.get(f"m{expert[0]}{expert[1]}", 0)
        return experts_of_turn(tokens, round_index, 2, order, last, tokens.__getitem__)

    assert of("least-trained", 1) == [(0, 1), (1, 0)]
    assert of("most-trained", 1) == [(0, 0), (1, 1)]
    assert of("numbered", 1) == [(0, 0), (0, 1)]
    assert of("least-trained", 2, m01=1, m10=1) == [(0, 0), (1, 1)]
    # In the next cycle, after round 2: 9 tokens in two rounds are fewer than 5 in one.
    assert of("least-trained", 3, m00=2, m01=2, m10=2, m11=1) == [(0, 1), (1, 0)]
    assert of("most-trained", 3, m00=2, m01=1, m10=1, m11=1) == [(0, 0), (1, 1)]
    tokens[0, 0] = 4.0
    assert of("most-trained", 3, m00=2, m01=2, m10=2, m11=0) == [(0, 0), (1, 0)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_expert_meets_once_in_a_cycle(order: str) -> None:
    draw = random.Random(3)
    experts = [(0, e) for e in range(11)]
    met = dict.fromkeys(experts, 0)
    for cycle in range(6):
        seen: list[tuple[int, int]] = []
        for turn in range(4):
            index = 4 * cycle + turn + 1
            tokens = {e: float(draw.randrange(1000)) for e in experts}
            chosen = experts_of_turn(experts, index, 4, order, met.__getitem__, tokens.__getitem__)
            met.update(dict.fromkeys(chosen, index))
            seen += chosen
        assert sorted(seen) == experts


# ------------------------------------------------------------------------------------------ bytes


def test_bytes_by_hand() -> None:
    """Of 5 experts 2, then 3 of 105 elements; dense values always; one bucket each."""
    elements = GroupElements({(0, 1, 2): 30, (0, 1): 525}, {}, {(0, 1): GroupExperts(5, 105)})
    dense = 2 * 2 * (10 * 4 + 8) + 2 * 128
    for index, count in ((1, 2), (2, 3), (3, 2)):
        experts = 2 * 1 * (-(-count * 105 // 2) * 4 + 8)
        sent = wire.round_bytes(
            [elements], 3, optimizer="fedavg", expert_turns=2, round_index=index
        )
        assert sent == dense + experts + 2 * 8 + 1 * 8
    # In some of many turns nobody's expert meets, and there is nothing to compare.
    sent = wire.round_bytes([elements], 3, optimizer="fedavg", expert_turns=9, round_index=1)
    assert sent == dense + 2 * 8


# --------------------------------------------------------------------------------------- meetings


def anchors_of(sync: OuterSync) -> dict[str, Tensor]:
    return {
        piece.key: anchor[place].clone()
        for layout, anchor in zip(sync.layout.layouts, sync.state.anchors, strict=True)
        for piece, place in layout.slices()
    }


def errors_of(sync: OuterSync) -> dict[str, Tensor]:
    """What encoding has lost of every piece; nothing of sums is kept apart."""
    result = {}
    for layout, feedback in zip(sync.layout.layouts, sync.state.feedback, strict=True):
        if feedback.own is not None:
            assert feedback.shares is not None and not bool(feedback.shares.any())
            result |= {p.key: feedback.own[at].clone() for p, at in layout.slices()}
    return result


def train(
    site: int, num_sites: int, replication: int, scope: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rounds of steps that route tokens unevenly; all that is known of each."""
    placement = place(num_sites, replication)
    model = SmallModel(placement, site, scope)
    if options.get("optimizer") != "fedavg":
        options = {"outer_lr": 0.7, "outer_momentum": 0.9, **options}
    sync = OuterSync(model, placement, site, OuterOptions(bucket_bytes=600, **options))
    inner, told = torch.optim.SGD(model.parameters(), lr=0.1), []
    for index in range(ROUNDS):
        loads = torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
        for step in range(STEPS):
            model(noise(("x", site, index, step), 6 + 5 * site, HIDDEN))
            for layer, module in enumerate(model.layers):
                loads[layer] += module.stats.load.double()
            give_gradients(model, site, index * STEPS + step)
            inner.step()
            sync.after_step()
        before = {"local": by_key(model), "anchor": anchors_of(sync), "error": errors_of(sync)}
        predicted = sync.predicted_bytes()
        report = sync.step()
        told.append(
            {
                **before,
                "loads": loads,
                "after": by_key(model),
                "moved": anchors_of(sync),
                "left": errors_of(sync),
                "bytes": (
                    report.bytes_sent,
                    predicted,
                    elements_bytes(placement, site, scope, sync),
                ),
                "hashes": sync.hashes(),
            }
        )
    sync.verify()
    return told


def by_key(model: SmallModel) -> dict[str, Tensor]:
    """Copies of all pieces, by the keys of layouts."""
    named = {}
    for key, value in pieces(model).items():
        if key[0] == "dense":
            named[key[1]] = value.view(-1)
        elif key[0] == "router":
            named[f"layers.{key[1]}.router.weight.{key[2]}"] = value.view(-1)
        else:
            named[f"layers.{key[1]}.experts.{key[2]}.{key[3]}"] = value.view(-1)
    return named


def elements_bytes(placement: Placement, site: int, scope: str, sync: OuterSync) -> int:
    """The bytes of this round by sizes alone, as a plan knows them."""
    experts = sync.layout.site.moe_layers[0].experts
    sizes = wire.Sizes(
        outside=HIDDEN * 3 + 1,
        block=0,
        expert=sum(part[0].numel() for part in experts.parameters()),
        router_row=HIDDEN,
    )
    options = sync.options
    return wire.round_bytes(
        wire.group_elements(placement, site, sizes, router_scope=scope),
        placement.num_sites,
        optimizer=options.optimizer,
        codec=sync.layout.site.codec.name,
        bucket_bytes=600,
        round_index=sync.round,
        counted_experts=0 if options.turn_order == "numbered" else LAYERS * EXPERTS,
        expert_turns=options.expert_turns,
    )


def wanted_turns(rounds: list[list[Any]], placement: Placement, turns: int, order: str) -> Any:
    """By round the experts that meet, by the definition: groups apart, from all holders' loads."""
    met = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    waiting = torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    result = []
    for index in range(1, ROUNDS + 1):
        for layer, expert in product(range(LAYERS), range(EXPERTS)):
            for site in placement.owners(layer, expert):
                waiting[layer, expert] += rounds[site][index - 1]["loads"][layer, expert]
        begun, chosen = (index - 1) // turns * turns, []
        groups: dict[Any, list[tuple[int, int]]] = {}
        for key in product(range(LAYERS), range(EXPERTS)):
            groups.setdefault(placement.owners(*key), []).append(key)
        for owners, experts in groups.items():
            left = [e for e in experts if met[e] <= begun]
            if order != "numbered":
                rate = {e: float(waiting[e]) / (index - int(met[e])) for e in left}
                left.sort(key=rate.__getitem__, reverse=order == "most-trained")
            many = turn_size(len(experts), turns, index)
            chosen += experts if len(owners) == 1 else left[:many]
        for expert in chosen:
            met[expert], waiting[expert] = index, 0
        result.append(set(chosen))
    return result


def expert_of(key: str, scope: str) -> tuple[int, int] | None:
    """The layer and number of what a piece belongs to; None for what meets every time."""
    words = key.split(".")
    if len(words) < 4 or (words[2] == "router" and scope == "global"):
        return None
    return int(words[1]), int(words[4] if words[2] == "router" else words[3])


CASES = [
    (2, 2, "global", {"optimizer": "fedavg", "expert_turns": 2}),
    (3, 2, "resident", {"optimizer": "fedavg", "expert_turns": 3}),
    (4, 2, "global", {"outer_momentum": 0.5, "expert_turns": 3, "turn_order": "most-trained"}),
    (4, 3, "resident", {"optimizer": "fedavg", "expert_turns": 2, "turn_order": "numbered"}),
    (4, 1, "resident", {"optimizer": "fedavg", "expert_turns": 2}),
    (2, 1, "global", {"optimizer": "fedavg", "expert_turns": 40}),
    (3, 2, "resident", {"optimizer": "fedavg", "expert_turns": 2, "codec": "int4"}),
    (4, 2, "global", {"outer_momentum": 0.5, "expert_turns": 3, "codec": "int8"}),
    (3, 3, "global", {"optimizer": "fedavg", "expert_turns": 2, "codec": "topk"}),
    (3, 2, "global", {"expert_turns": 2, "codec": "int2", "rounding": "stochastic"}),
    (3, 2, "global", {"expert_turns": 2, "expert_mean": "tokens", "optimizer": "fedavg"}),
]


@pytest.mark.parametrize(("num_sites", "replication", "scope", "options"), CASES)
def test_meetings_are_as_defined(
    num_sites: int, replication: int, scope: str, options: dict[str, Any]
) -> None:
    rounds = pool().run(num_sites, train, replication, scope, options)
    placement = place(num_sites, replication)
    order, turns = options.get("turn_order", "least-trained"), options["expert_turns"]
    wanted = wanted_turns(rounds, placement, turns, order)
    if order != "numbered" and replication > 1:
        assert wanted[0] != wanted[turns], "loads must not always give the same order"
    weights = options.get("expert_mean", "equal")
    momentum: dict[str, Tensor] = {}
    waiting = torch.zeros(num_sites, LAYERS, EXPERTS, dtype=torch.float64)
    for index in range(ROUNDS):
        now = [site[index] for site in rounds]
        for site in now:
            counted, predicted, planned = site["bytes"]
            assert counted == predicted == planned
        waiting += torch.stack([site["loads"] for site in now])
        for key in sorted({key for site in now for key in site["anchor"]}):
            expert = expert_of(key, scope)
            piece = piece_of(key)
            holders = receivers(piece, placement, scope)
            moved = [bits(now[site]["moved"][key]) for site in holders]
            assert len(set(moved)) == 1, (index, key)
            before, after = now[holders[0]]["anchor"][key], now[holders[0]]["moved"][key]
            if expert is not None and expert not in wanted[index]:
                assert bits(before) == bits(after)
                for site in holders:  # goes on as the holder has trained it
                    assert bits(now[site]["after"][key]) == bits(now[site]["local"][key])
                    if now[site]["error"]:
                        assert bits(now[site]["left"][key]) == bits(now[site]["error"][key])
                continue
            for site in holders:
                assert bits(now[site]["after"][key]) == bits(after)
            givers = contributors(piece, placement)
            deltas = [before.double() - now[s]["local"][key].double() for s in givers]
            share = torch.full((len(givers),), 1.0 / len(givers), dtype=torch.float64)
            if weights == "tokens" and piece[0] == "expert":
                routed = waiting[list(givers), expert[0], expert[1]]  # type: ignore[index]
                share = routed / max(1.0, float(routed.sum()))
            mean = sum(w * d for w, d in zip(share, deltas, strict=True))
            if now[holders[0]]["error"]:
                # What was sent is all deltas and errors, but for the errors that are left.
                for site in holders:
                    kept = now[site]["error"].get(key)
                    if kept is not None:
                        mean = mean + (kept.double() - now[site]["left"][key].double()) / len(
                            givers
                        )
            if options.get("optimizer") == "fedavg":
                step = mean
            else:
                decay = options.get("outer_momentum", 0.9)
                momentum[key] = decay * momentum.get(key, torch.zeros(())) + mean
                step = 0.7 * (mean + decay * momentum[key])
            error = (before.double() - step - after.double()).abs().max()
            assert float(error) < 2e-5, (index, key)
        for layer, number in wanted[index]:
            waiting[:, layer, number] = 0


def piece_of(key: str) -> tuple[Any, ...]:
    """As `outer_model.pieces` names it."""
    words = key.split(".")
    if len(words) < 4:
        return ("dense", key)
    if words[2] == "router":
        return ("router", int(words[1]), int(words[4]))
    return ("expert", int(words[1]), int(words[3]), words[4])


# ----------------------------------------------------------------------------------- state, errors


def resumed(site: int, num_sites: int, codec: str) -> Any:
    """Five rounds, and the last three of them again from the state after the second, in the middle
    of a cycle."""
    placement = place(num_sites)

    def make() -> tuple[SmallModel, torch.optim.Optimizer, OuterSync]:
        model = SmallModel(placement, site)
        sync = OuterSync(
            model, placement, site, OuterOptions(codec=codec, expert_turns=3, bucket_bytes=600)
        )
        return model, torch.optim.SGD(model.parameters(), lr=0.1), sync

    def go_on(model: Any, inner: Any, sync: OuterSync, first: int, last: int) -> Any:
        for index in range(first, last):
            model(noise(("x", site, index), 6 + 5 * site, HIDDEN))
            give_gradients(model, site, index)
            inner.step()
            sync.after_step()
            sync.step()
        return sync.hashes(), sync.counts.met.tolist(), [bits(p) for p in model.parameters()]

    model, inner, sync = make()
    go_on(model, inner, sync, 0, 2)
    copy = lambda value: value.clone() if isinstance(value, Tensor) else value
    state = {
        k: {n: copy(t) for n, t in v.items()} if isinstance(v, dict) else copy(v)
        for k, v in sync.state_dict().items()
    }
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    whole = go_on(model, inner, sync, 2, 5)
    model, inner, sync = make()
    model.load_state_dict(weights)
    sync.load_state_dict(state)
    return whole, go_on(model, inner, sync, 2, 5)


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_a_state_in_the_middle_of_a_cycle(codec: str) -> None:
    for whole, again in pool().run(3, resumed, codec):
        assert whole == again
        assert {4, 5} < {round_ for row in whole[1] for round_ in row}


def global_model(site: int, num_sites: int) -> Any:
    """The anchor after a last meeting, as the model of all sites."""
    placement = place(num_sites)
    model = SmallModel(placement, site)
    sync = OuterSync(model, placement, site, OuterOptions(optimizer="fedavg", expert_turns=2))
    give_gradients(model, site, 0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    sync.step()
    before = pieces(model)
    sync.copy_anchor_to_model()
    return before, pieces(model)


def test_the_anchor_is_the_model_of_all_sites() -> None:
    answers = pool().run(3, global_model)
    placement = place(3)
    apart = 0
    for key in {key for answer in answers for key in answer[0]}:
        sites = receivers(key, placement, "global")
        apart += len({bits(answers[site][0][key]) for site in sites}) > 1
        assert len({bits(answers[site][1][key]) for site in sites}) == 1
    assert apart == 12 * len(SmallModel(placement, 0).layers[0].experts.parts)


def one_order_differs(site: int, num_sites: int) -> str:
    model = SmallModel(place(num_sites), site)
    order = ORDERS[site]
    try:
        OuterSync(model, place(num_sites), site, OuterOptions(expert_turns=2, turn_order=order))
    except MeetingError as error:
        return str(error)
    return ""


def test_sites_must_agree_on_the_order() -> None:
    assert all("the same turn_order" in text for text in pool().run(2, one_order_differs))


def alone(**options: Any) -> OuterSync:
    placement = place(1, 1)
    return OuterSync(SmallModel(placement, 0), placement, 0, OuterOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_turns": 0}, "expert_turns must be at least 1, got 0"),
        ({"expert_turns": 2, "turn_order": "first"}, "turn_order must be one of least-trained"),
        ({"expert_turns": 2, "optimizer": "ddp"}, "needs optimizer diloco or fedavg"),
        ({"expert_turns": 2, "optimizer": "local-adamw"}, "needs optimizer diloco or fedavg"),
        ({"expert_turns": 2, "overlap": 1, "local_steps": 2}, "fragments = 1 and overlap = 0"),
        ({"expert_turns": 2, "staged": True}, "staged needs fragments = 1"),
        ({"expert_turns": 2, "clip_delta": 2.0}, "clip_delta needs fragments = 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alone(**options)


def test_a_layout_of_a_turn_is_part_of_the_vectors_of_all() -> None:
    """Its pieces keep their places there; any range is read from them and written back to them."""
    (whole,) = alone().layout.layouts
    experts = {(0, 3), (0, 4), (1, 11)}
    layout = TurnLayout(whole, experts)
    kept = [(p, at) for p, at in whole.slices() if p.expert is None or p.expert in experts]
    assert [*layout.slices()] == kept and len(kept) < len(whole.pieces)
    vector = torch.arange(whole.numel, dtype=torch.float32)
    wanted = torch.cat([vector[at] for _, at in kept])
    assert layout.numel == wanted.numel()
    draw = random.Random(1)
    ends = [(0, 0), (0, layout.numel)]
    ends += [sorted(draw.choices(range(layout.numel + 1), k=2)) for _ in range(50)]
    for start, stop in ends:
        assert layout.take(vector, start, stop).tolist() == wanted[start:stop].tolist()
        with layout.lent(vector, start, stop) as values:
            assert values is not None
            values += whole.numel
        wanted[start:stop] += whole.numel
    assert torch.cat([vector[at] for _, at in kept]).tolist() == wanted.tolist()
    others = torch.ones(whole.numel, dtype=torch.bool)
    for _, at in kept:
        others[at] = False
    assert vector[others].tolist() == torch.arange(whole.numel)[others].tolist()


def test_experts_of_unlike_sizes_are_refused() -> None:
    model = SmallModel(place(1, 1), 0)
    parts = model.layers[1].experts
    for name in parts.parts:
        stack = parts.part(name)
        wider = torch.zeros(stack.shape[0], *(n + (n == SIZE) for n in stack.shape[1:]))
        parts.register_parameter(name, torch.nn.Parameter(wider))
    OuterSync(model, place(1, 1), 0)
    with pytest.raises(ValueError, match="experts of one size"):
        OuterSync(model, place(1, 1), 0, OuterOptions(expert_turns=2))


def test_reshuffle_is_refused() -> None:
    placement = place(1, 1)
    model = SmallModel(placement, 0)
    inner = torch.optim.AdamW(model.parameters())
    sync = OuterSync(model, placement, 0, OuterOptions(expert_turns=2), inner_optimizer=inner)
    with pytest.raises(ValueError, match="not possible with expert_turns > 1"):
        sync.reshuffle(placement)
