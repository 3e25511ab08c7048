"""Frozen copies of absent experts are refreshed by their holders in meetings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from outer_model import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    SIZE,
    SmallModel,
    bits,
    cyclic_placement,
    give_gradients,
    pieces,
)
from sites import pool
from torch import Tensor, nn

from fomoe_ext.layer.assemble import expert_key
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.outer import MeetingError, OuterOptions, OuterSync
from fomoe_ext.outer.codec import get_codec
from fomoe_ext.placement import Placement, stale, wire

EXPERT = 3 * SIZE * HIDDEN + 2 * SIZE + HIDDEN
"""Elements of an expert of the small model, with biases."""


class CopyModel(SmallModel):
    """The small model whose layers keep the copies that `wanted` says."""

    def __init__(self, placement: Placement, site: int, wanted: stale.Wanted) -> None:
        super().__init__(placement, site, expert_bias=True)
        self.layers = nn.ModuleList(
            MoELayer(
                HIDDEN,
                SIZE,
                EXPERTS,
                2,
                resident_experts=placement.resident(layer, site),
                stale_experts=wanted[layer][site],
                layer_index=layer,
                seed=5,
                expert_bias=True,
            )
            for layer in range(LAYERS)
        )


def copies_of(model: nn.Module) -> dict[tuple[Any, ...], Tensor]:
    """Clones of the frozen copies, by ("expert", layer, expert, part)."""
    result = {}
    for index, layer in enumerate(model.layers):
        for expert in layer.stale.resident_experts if layer.stale else ():
            values = layer.stale.expert_weights(expert)
            for part, value in zip(layer.stale.parts, values, strict=True):
                result["expert", index, expert, part] = value.clone()
    return result


def meet(
    site: int,
    num_sites: int,
    replication: int,
    count: int,
    codec: str,
    period: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    placement = cyclic_placement(num_sites, replication)
    model = CopyModel(placement, site, stale.wanted_copies(placement, count))
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(
        model,
        placement,
        site,
        OuterOptions(stale_codec=codec, stale_period=period, **options),
        inner_optimizer=inner,
    )
    copies, rounds = sync.copies, []
    for index in range(3):
        give_gradients(model, site, index)
        inner.step()
        predicted, sync.copies = sync.predicted_bytes(), None
        without, sync.copies = sync.predicted_bytes(), copies
        local = pieces(model)
        report = sync.step()
        assert report.bytes_sent == predicted
        rounds.append((report.bytes_sent - without, local, pieces(model), copies_of(model)))
    sync.verify()
    everything: list[Any] = [None] * num_sites
    dist.all_gather_object(everything, pieces(model))
    whole = {
        expert_key(f"layers.{key[1]}", key[2], key[3]): value
        for of_site in everything
        for key, value in of_site.items()
        if key[0] == "expert"
    }
    refreshed = {}
    if copies is not None:
        sync.refresh_copies()
        refreshed = copies_of(model)
        for layer in model.layers:
            for part in layer.stale.parts:
                layer.stale.part(part).fill_(7)
        copies.fill(whole.__getitem__)
    return {"rounds": rounds, "refreshed": refreshed, "filled": copies_of(model)}


CASES = [
    (2, 1, -1, "fp32", 1, {}),
    (2, 1, 2, "int4", 1, {"bucket_bytes": 400, "in_flight": 1}),
    (3, 2, 3, "bf16", 2, {"optimizer": "local-adamw"}),
    (4, 2, -1, "int8", 1, {"codec": "int8", "optimizer": "fedavg"}),
    (4, 3, 1, "int8", 3, {}),
    (3, 2, 0, "int8", 1, {}),
]


def encoded(expert: list[Tensor], codec: str) -> list[Tensor]:
    """An expert's tensors after encoding and decoding."""
    flat = torch.cat([part.reshape(-1) for part in expert])
    values = get_codec(codec).decode(get_codec(codec).encode(flat), flat.numel())
    parts = values.split([part.numel() for part in expert])
    return [value.view(part.shape) for value, part in zip(parts, expert, strict=True)]


@pytest.mark.parametrize(("num_sites", "replication", "count", "codec", "period", "options"), CASES)
def test_after_a_meeting_copies_are_what_a_holder_sends(
    num_sites: int, replication: int, count: int, codec: str, period: int, options: dict[str, Any]
) -> None:
    answers = pool().run(num_sites, meet, replication, count, codec, period, options)
    placement = cyclic_placement(num_sites, replication)
    wanted = stale.wanted_copies(placement, count)
    each = wire.wire_bytes(codec, EXPERT) + 8
    parts = ("expand_weight", "contract_weight", "expand_bias", "contract_bias")
    for site, answer in enumerate(answers):
        source = CopyModel(placement, site, wanted)
        before = copies_of(source)
        compared = 0
        for index in range(3):
            _, _, _, copies = answer["rounds"][index]
            for layer, expert in {key[1:3] for key in copies}:
                names = [("expert", layer, expert, part) for part in parts]
                holder = answers[placement.owners(layer, expert)[0]]["rounds"][index][2]
                if (index + 1) % period == 0:
                    now = encoded([holder[name] for name in names], codec)
                    assert not torch.equal(now[0], before[names[0]])
                else:
                    now = [before[name] for name in names]
                for name, value in zip(names, now, strict=True):
                    assert bits(copies[name]) == bits(value), (site, index, name)
                    compared += 1
            before = copies
        assert compared == 3 * 4 * sum(len(of_sites[site]) for of_sites in wanted)
        assert answer["filled"].keys() == answer["refreshed"].keys()
        for name, value in answer["refreshed"].items():
            assert bits(answer["filled"][name]) == bits(value)
    asked = sum(len(mine) for of_sites in wanted for mine in of_sites)
    for index in range(3):
        extra = sum(answer["rounds"][index][0] for answer in answers)
        assert extra == (asked * each if (index + 1) % period == 0 else 0)
    if options.get("optimizer") == "fedavg":
        check_router(answers, placement, wanted)


def check_router(answers: list[Any], placement: Placement, wanted: stale.Wanted) -> None:
    """A router row is averaged over all sites that compute its expert, as it has a gradient there.
    int8 loses up to half a step of a block."""
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            here = set(placement.owners(layer, expert))
            here |= {s for s, mine in enumerate(wanted[layer]) if expert in mine}
            local = [answers[s]["rounds"][0][1]["router", layer, expert] for s in sorted(here)]
            after = answers[0]["rounds"][0][2]["router", layer, expert]
            assert torch.allclose(after, torch.stack(local).mean(0), atol=1e-3)
            assert len(here) == placement.num_sites


def damaged(site: int, num_sites: int) -> str:
    placement = cyclic_placement(num_sites, 1)
    model = CopyModel(placement, site, stale.wanted_copies(placement, 1))
    sync = OuterSync(model, placement, site)
    group = sync.groups.group(sync.groups.everyone)
    send = group.send_to_each

    def send_badly(received: Tensor, *arguments: Any) -> int:
        count = send(received, *arguments)
        received[3] ^= 1
        return count

    group.send_to_each = send_badly
    with pytest.raises(MeetingError) as caught:
        sync.refresh_copies()
    return str(caught.value)


def test_a_damaged_copy_is_refused():
    for message in pool().run(2, damaged):
        assert "the copy of expert" in message and "was damaged on the way" in message


def refused(site: int, num_sites: int, options: dict[str, Any], reshuffle: bool) -> str:
    placement = cyclic_placement(num_sites, 1)
    model = CopyModel(placement, site, stale.wanted_copies(placement, 1))
    inner = torch.optim.AdamW(model.parameters())
    with pytest.raises((ValueError, TypeError)) as caught:
        sync = OuterSync(model, placement, site, OuterOptions(**options), inner_optimizer=inner)
        assert reshuffle
        sync.reshuffle(placement)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "ddp"}, "an optimizer that is not ddp, got 1, 0, 1 and 'ddp'"),
        ({"fragments": 2, "local_steps": 4}, "stale_experts need fragments = 1"),
        ({"overlap": 1, "local_steps": 4}, "overlap = 0"),
        ({"staged": True}, "staged needs a model without stale_experts"),
        ({"stale_codec": "topk"}, "stale_codec must be one of fp32, bf16, int8, int4, got 'topk'"),
        ({"stale_period": 0}, "stale_period must be at least 1, got 0"),
        ({}, "reshuffle: not possible with stale experts"),
    ],
)
def test_options_that_exclude_copies_are_refused(options, message):
    for answer in pool().run(2, refused, options, not options):
        assert message in answer
