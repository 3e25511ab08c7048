"""Frozen copies of absent experts: computed like the experts themselves, trained by nobody here,
made anew by a holder in meetings.
"""

from __future__ import annotations

import shutil
from collections import Counter
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
    give_gradients,
    noise,
    pieces,
)
from sites import pool
from small_job import SMALL, finish, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.layer.assemble import expert_key
from fomoe_ext.layer.moe import MoELayer
from fomoe_ext.outer import MeetingError, OuterSync
from fomoe_ext.outer.codec import get_codec
from fomoe_ext.placement import Placement, stale, wire
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.plan import memory as plan_memory
from fomoe_ext.plan import traffic as plan
from fomoe_ext.report.runs import job_config

EXPERT = 3 * SIZE * HIDDEN + 2 * SIZE + HIDDEN
"""Elements of an expert of the small model, with biases."""

# ---- the layer -----------------------------------------------------------------------------------


def layer_of(resident: list[int] | None, copies: list[int], **options: Any) -> MoELayer:
    """A layer of 8 experts; everything but who holds what is the same for all."""
    layer = MoELayer(
        16, 12, 8, 3, resident_experts=resident, stale_experts=copies, seed=3, **options
    )
    with torch.no_grad():
        for module in (layer.experts, *([layer.stale] if layer.stale else [])):
            for row, expert in enumerate(module.resident_experts):
                for part in module.parts:
                    if part.endswith("bias"):
                        shape = module.part(part)[row].shape
                        module.part(part)[row].copy_(0.1 * noise((part, expert), *shape))
    return layer


def run(layer: MoELayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input and of the router."""
    x = noise("x", 4, 25, 16).to(dtype).requires_grad_()
    y = layer(x)
    (y * noise("w", 4, 25, 16)).sum().backward()
    assert x.grad is not None and layer.router.weight.grad is not None
    return y.detach(), x.grad, layer.router.weight.grad


@pytest.mark.parametrize(
    "kind", [{"activation": "swiglu"}, {"activation": "gelu", "skipped_mass": "rescale"}], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("copies", [[0, 2, 3, 6, 7], [2, 7]], ids=["all", "some"])
def test_a_layer_computes_copies_as_if_it_held_them(copies, dtype, tolerance, kind):
    own = [1, 4, 5]
    options: dict[str, Any] = {**kind, "bias": True, "dtype": dtype}
    holder = layer_of(sorted(own + copies), [], **options)
    layer = layer_of(own, copies, **options)
    for mine, theirs in zip(run(layer, dtype), run(holder, dtype), strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    for part in layer.experts.parts:
        mine = layer.experts.part(part).grad
        rows = [holder.experts.resident_experts.index(e) for e in own]
        theirs = holder.experts.part(part).grad[rows]
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert layer.stats.rows == holder.stats.rows > 0
    assert bool(layer.stats.skipped_share == 0) == (len(copies) == 5)
    alone = layer_of(own, [], **options)
    run(alone, dtype)
    assert alone.stats.rows < layer.stats.rows


class Backwards(TorchDispatchMode):
    """Records which weight gradients the fused backward passes were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, bool, bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fomoe.moe_experts_backward.default:
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            experts = given["contract_weight"].shape[0]
            self.asked.append((experts, given["need_expand"], given["need_contract"]))
        return function(*args, **(kwargs or {}))


def test_nothing_of_a_copy_is_trained():
    layer = layer_of([1, 4, 5], [0, 7])
    assert layer.stale is not None and layer.stale.nbytes == 2 * 3 * 12 * 16 * 4
    names = {name for name, _ in layer.named_parameters()} | set(layer.state_dict())
    assert names and not any("stale" in name for name in names)
    before = {part: layer.stale.part(part).clone() for part in layer.stale.parts}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    with Backwards() as seen:
        run(layer, torch.float32)
    assert sorted(seen.asked) == [(2, False, False), (3, True, True)]
    optimizer.step()
    for part, value in before.items():
        tensor = layer.stale.part(part)
        assert not tensor.requires_grad and tensor.grad is None and bits(tensor) == bits(value)
    layer.stale.expand_weight.zero_()
    layer.reset_parameters()
    assert bits(layer.stale.expand_weight) == bits(before["expand_weight"])
    layer = layer_of([1, 4, 5], [0, 7], device="meta")
    layer.make_buffers("cpu")
    assert bits(layer.stale.expand_weight) == bits(before["expand_weight"])


def test_bad_layers_are_named():
    for options, message in (
        ({"stale_experts": [1, 2]}, r"stale_experts must be absent ones, \[1\] are resident"),
        ({"stale_experts": [2, 2]}, "stale_experts must be distinct"),
        ({"stale_experts": [8]}, r"stale_experts must be in 0..7 .*, got \[8\]"),
        ({"stale_experts": [2], "router_scope": "resident"}, "needs router_scope 'global'"),
    ):
        with pytest.raises(ValueError, match=message):
            MoELayer(16, 12, 8, 3, resident_experts=[0, 1], **options)
    with pytest.raises(TypeError, match="stale_experts must be ints"):
        MoELayer(16, 12, 8, 3, resident_experts=[0, 1], stale_experts=["2"])
    with pytest.raises(RuntimeError, match="not possible in a layer with stale experts"):
        layer_of([1], [2]).set_resident_experts([2])


# ---- who keeps and sends what --------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 8, 2, 1), (3, 9, 2, 1), (4, 16, 3, 2), (5, 20, 3, 3)])
@pytest.mark.parametrize("kind", ["cyclic", "random"])
def test_copies_and_the_work_of_sending_them_are_spread_evenly(sizes, kind):
    placement = Placement.cyclic(*sizes) if kind == "cyclic" else Placement.random(*sizes, seed=1)
    sites, experts, layers, replication = sizes
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
        with pytest.raises(ValueError, match=rf"in 0..{absent}, .* got {count}"):
            stale.wanted_copies(placement, count)
    with pytest.raises(ValueError, match="site 0 holds expert"):
        own = tuple(tuple((placement.resident(0, 0)[0],) for _ in range(sites)) for _ in range(1))
        stale.copy_transfers(placement, own)


def test_the_most_chosen_absent_experts_are_copied():
    placement = Placement.cyclic(2, 6, 2, 1)
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
        with pytest.raises(ValueError, match="load must be of 2 layers of 6 experts, got"):
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


# ---- meetings ------------------------------------------------------------------------------------


class CopyModel(SmallModel):
    """The small model whose layers keep the copies that `wanted` says."""

    def __init__(self, placement: Placement, site: int, wanted: stale.Wanted) -> None:
        super().__init__(placement, site, bias=True)
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
                bias=True,
            )
            for layer in range(LAYERS)
        )


def copies_of(model: nn.Module) -> dict[tuple[Any, ...], Tensor]:
    """Copies of the copies, by ("expert", layer, expert, part)."""
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
    placement = Placement.cyclic(num_sites, EXPERTS, LAYERS, replication)
    model = CopyModel(placement, site, stale.wanted_copies(placement, count))
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    sync = OuterSync(
        model,
        placement,
        site,
        inner_optimizer=inner,
        stale_codec=codec,
        stale_period=period,
        **options,
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
    """An expert as it arrives."""
    flat = torch.cat([part.reshape(-1) for part in expert])
    values = get_codec(codec).decode(get_codec(codec).encode(flat), flat.numel())
    parts = values.split([part.numel() for part in expert])
    return [value.view(part.shape) for value, part in zip(parts, expert, strict=True)]


@pytest.mark.parametrize(("num_sites", "replication", "count", "codec", "period", "options"), CASES)
def test_after_a_meeting_copies_are_what_a_holder_sends(
    num_sites: int, replication: int, count: int, codec: str, period: int, options: dict[str, Any]
) -> None:
    answers = pool().run(num_sites, meet, replication, count, codec, period, options)
    placement = Placement.cyclic(num_sites, EXPERTS, LAYERS, replication)
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
    """A router row is averaged over all sites that compute its expert: it gets its gradient there.
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
    placement = Placement.cyclic(num_sites, EXPERTS, LAYERS, 1)
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
    placement = Placement.cyclic(num_sites, EXPERTS, LAYERS, 1)
    model = CopyModel(placement, site, stale.wanted_copies(placement, 1))
    inner = torch.optim.AdamW(model.parameters())
    with pytest.raises((ValueError, TypeError)) as caught:
        sync = OuterSync(model, placement, site, inner_optimizer=inner, **options)
        assert reshuffle
        sync.reshuffle(placement)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "ddp"}, "an optimizer that is not ddp, got 1, 0, 1 and 'ddp'"),
        ({"fragments": 2, "local_steps": 4}, "stale_experts need fragments = 1"),
        ({"overlap": 1, "local_steps": 4}, "overlap = 0"),
        ({"stale_codec": "topk"}, "stale_codec must be one of fp32, bf16, int8, int4, got 'topk'"),
        ({"stale_period": 0}, "stale_period must be at least 1, got 0"),
        ({}, "reshuffle: not possible with stale experts"),
    ],
)
def test_meetings_that_cannot_be_are_refused(options, message):
    for answer in pool().run(2, refused, options, not options):
        assert message in answer


# ---- the cost model ------------------------------------------------------------------------------


def test_the_cost_model_by_hand():
    shared = ["--sites", "4", "--replication", "1", "--router-scope", "global"]
    config = job_config([*shared, "--stale-experts", "3", "--stale-codec", "bf16"])
    model, placement = config.model, plan.job_placement(config)
    one = 3 * model.hidden_size * model.expert_size
    plain = job_config(shared)
    for site in range(4):
        with_copies = plan.meeting_bytes(config, placement, site)
        extra = with_copies - plan.meeting_bytes(plain, placement, site)
        assert extra == plan.copied_bytes(config, placement, site)
        memory = plan_memory.job_memory(config, placement, site)
        assert memory.stale_copies == 4 * 3 * model.num_layers * one
        assert memory.total == plan_memory.job_memory(plain, placement, site).total + (
            memory.stale_copies
        )
        assert plan_memory.rank_memories(config, placement, site) == [memory]
    sent = [plan.copied_bytes(config, placement, site) for site in range(4)]
    assert sent == [3 * model.num_layers * (2 * one + 8)] * 4
    assert plan.stale_share(config) == 3 / 16
    flops = plan_cost.flops_per_token(model, 1 / 4, 3 / 16)
    assert flops.stale_experts == pytest.approx(flops.experts * 3 / 4)
    less = plan_cost.flops_per_token(model, 1 / 4)
    assert flops.forward == less.forward + flops.stale_experts
    assert flops.training == pytest.approx(less.training + 2 * flops.stale_experts)
    with pytest.raises(ValueError, match="stale_share"):
        plan_cost.flops_per_token(model, 0.5, 0.6)
    cost = plan_cost.round_cost(config, placement, wire.Link(1e9, 0.01), 1e13)
    least = plan_cost.round_cost(plain, placement, wire.Link(1e9, 0.01), 1e13)
    assert cost.waits == least.waits + 1 and cost.bytes_sent == least.bytes_sent + sent[0]
    assert cost.flops > least.flops and cost.memory == least.memory + memory.stale_copies


# ---- jobs ----------------------------------------------------------------------------------------


def test_a_job_with_copies_of_all_absent_experts_skips_nothing(flags, tmp_path):
    result = train(*flags, "--stale-experts", "-1", "--stale-codec", "fp32")
    report = finish(tmp_path / "run", result)
    for site in report["sites"]:
        assert site["skipped_share"] == 0
        assert site["bytes_sent"] == site["planned"]["bytes"] > 0
        assert site["memory"]["stale_copies"] == 2 * 4 * 3 * 16 * 8 * 4  # layers, experts
    flops = report["flops_per_token"]["this run"]
    assert flops["stale_experts"] == flops["experts"] > 0
    assert flops["forward"] == report["flops_per_token"]["full replica"]["forward"]
    assert "stale copies" in (tmp_path / "run" / "report.md").read_text()


def test_copies_of_the_most_chosen_experts_skip_fewer_slots(flags, tmp_path):
    """By the load of an earlier run; bytes are as planned though some are sent more often."""
    first, changes = tmp_path / "run", ["--stale-experts", "2", "--inner-lr", "0.001"]
    evenly = finish(first, train(*flags, *changes))
    second = tmp_path / "by-load"
    by_load = [*changes, "--stale-by", str(first), "--run-dir", str(second)]
    chosen = finish(second, train(*flags, *by_load))
    share = lambda report: sum(site["skipped_share"] for site in report["sites"])
    assert share(chosen) < share(evenly)
    for site in chosen["sites"]:
        assert site["bytes_sent"] == site["planned"]["bytes"]
    wrong = [*by_load[:-1], str(tmp_path / "wrong"), "--num-layers", "1"]
    result = train(*flags, *wrong)
    assert result.returncode != 0
    assert "stale_by" in result.stderr and "of 1 layers of 8 experts" in result.stderr


def test_resuming_gives_the_same_bits(flags, tmp_path):
    """Copies are refreshed after rounds 2 and 4: made from the checkpoint of round 2, and of rounds
    1 and 3 kept in it."""
    run_dir = tmp_path / "run"
    changes = ["--stale-experts", "2", "--stale-period", "2", "--checkpoint-rounds", "1"]
    whole = finish(run_dir, train(*flags, *changes))
    assert all(0 < site["skipped_share"] < 1 for site in whole["sites"])
    for kept in (3, 2, 1):
        for checkpoint in ckpt.list_checkpoints(run_dir / "checkpoints")[kept:]:
            shutil.rmtree(checkpoint)
        (run_dir / "report.json").unlink()
        result = train("--resume", str(run_dir))
        report = finish(run_dir, result)
        assert f"round {kept}, step {3 * kept}" in result.stdout
        assert report["run"]["model_hash"] == whole["run"]["model_hash"]
        assert report["validation"] == whole["validation"]
        for site, before in zip(report["sites"], whole["sites"], strict=True):
            assert site["bytes_sent"] == before["bytes_sent"] == site["planned"]["bytes"]
            assert site["skipped_share"] == before["skipped_share"]


def test_a_job_goes_on_at_other_sites_with_other_copies(flags, tmp_path):
    run_dir = tmp_path / "run"
    finish(run_dir, train(*flags, "--stale-experts", "2", "--rounds", "1"))
    changes = ["--rounds", "2", "--sites", "4", "--stale-experts", "-1", "--batch-size", "1"]
    report = finish(run_dir, train("--resume", str(run_dir), *changes))
    for site in report["sites"]:
        assert site["skipped_share"] == 0 and site["bytes_sent"] == site["planned"]["bytes"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--stale-experts 5", "sites.stale_experts must be at most the 4 experts"),
        ("--stale-experts -2", "sites.stale_experts must be >= -1, got -2"),
        ("--stale-codec topk", "stale-codec"),
        ("--stale-by x.json", "sites.stale_by needs sites.stale_experts of 1 or more, got 0"),
        ("--stale-experts -1 --stale-by x.json", "of 1 or more, got -1"),
        ("--stale-period 0", "outer.stale_period must be >= 1, got 0"),
        ("--stale-experts 1 --optimizer ddp", "got 1, 0, 1 and ddp"),
        ("--stale-experts 1 --overlap 1", "sites.stale_experts needs outer.fragments = 1"),
        ("--stale-experts 1 --router-scope resident", "needs model.router_scope = global"),
        ("--stale-experts 1 --ranks-per-site 2", "and sites.ranks_per_site = 1, got 0 and 2"),
        (
            "--stale-experts 1 --placement random --reshuffle-rounds 2",
            "sites.stale_experts needs sites.reshuffle_rounds = 0",
        ),
    ],
)
def test_bad_flags_are_named(changes, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        job_config([*SMALL, "--sites", "2", "--replication", "1", *changes.split()])
    assert message in " ".join((str(caught.value) + capsys.readouterr().err).split())
