"""The cost model against counting by hand; the report and `fomoe plan` made of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from planned_job import config_of

from fomoe_ext import cli
from fomoe_ext.config.model import count_parameters
from fomoe_ext.placement import wire
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.plan import memory as plan_memory
from fomoe_ext.plan import traffic as plan


@pytest.mark.parametrize("replication", [1, 2, 4])
@pytest.mark.parametrize("scope", ["global", "resident"])
def test_a_meeting_by_hand(replication, scope):
    """Every owner group, bucket and share of one site, one after the other."""
    config = config_of(
        sites={"sites": 4, "replication": replication},
        model={"router_scope": scope},
        outer={"bucket_bytes": 40_000, "codec": "bf16"},
    )
    model, placement = config.model, plan.job_placement(config)
    site = 2
    dense = model.vocab_size * model.hidden_size + 2 * model.hidden_size
    dense += model.num_layers * (4 * model.hidden_size**2 + 4 * model.hidden_size)
    elements, biases = {(0, 1, 2, 3): dense}, {}
    for layer in range(model.num_layers):
        for expert in range(model.num_experts):
            owners = placement.owners(layer, expert)
            router = (0, 1, 2, 3) if scope == "global" else owners
            for group, count in (
                (owners, 3 * model.intermediate_size * model.hidden_size),
                (router, model.hidden_size),
            ):
                if site in group:
                    elements[group] = elements.get(group, 0) + count
            if site in router:
                biases[router] = biases.get(router, 0) + 1
    sent = 3 * (72 + 128)  # a note of nine numbers and a status to every other site
    sent += sum(8 * (len(group) - 1) for group in elements.keys() | biases.keys())
    for counts, width in ((elements, 2), (biases, 4)):  # bf16, but biases in fp32
        for group, count in counts.items():
            while count:
                bucket = min(count, 10_000)
                share = -(-bucket // len(group))
                sent += 2 * (len(group) - 1) * (share * width + 8)  # two stages, hashed
                count -= bucket
    assert config.model.balance == "bias"
    assert plan.meeting_bytes(config, placement, site) == sent


def test_more_replication_costs_more_and_a_full_replica_most():
    sent, held = [], []
    for replication in (1, 2, 4):
        config = config_of(sites={"replication": replication})
        placement = plan.job_placement(config)
        sent.append(plan.meeting_bytes(config, placement, 0))
        held.append(plan_memory.site_memory(config.model, placement, 0).total)
    assert sent == sorted(sent) and held == sorted(held) and sent[0] < sent[1] < sent[2]
    assert sent[2] == plan.full_replica_bytes(config, 1)
    full = plan_memory.site_memory(config.model, None).total
    assert held[2] == full
    sparse = count_parameters(config.model).sparse
    assert held[1] == full - sparse // 2 * 4 * 6  # half of the experts, six fp32 copies


def test_a_placement_needs_a_site():
    config = config_of()
    placement = plan.job_placement(config)
    for memory in (plan_memory.site_memory, plan_memory.site_parameters):
        with pytest.raises(ValueError, match="site must be given with a placement, got None"):
            memory(config.model, placement)
    with pytest.raises(ValueError, match="site must be given with a placement, got None"):
        plan_memory.job_memory(config, placement)
    full = plan_memory.job_memory(config, None)
    assert full == plan_memory.job_memory(config, None, 1)


def test_ring_formula_is_the_limit_of_large_buckets():
    """Up to padding and hashes, 2 (n - 1) / n of the payload, as a ring all-reduce sends."""
    for members in (2, 3, 5, 8):
        exact = wire.all_reduce_bytes(1_000_003, members, "fp32", 1 << 30)
        assert exact == pytest.approx(plan_cost.paper_ring_bytes(4 * 1_000_003, members), rel=3e-5)


def test_flops_by_hand():
    model = config_of().model
    flops = plan_cost.flops_per_token(model, 0.5)
    width, layers = model.hidden_size, model.num_layers
    assert flops.router == layers * 2 * model.num_experts * width
    one_expert = 2 * 3 * width * model.intermediate_size
    assert flops.experts == layers * model.top_k * 0.5 * one_expert
    assert flops.unembedding == 2 * model.vocab_size * width
    causal = sum(2 * 2 * width * (t + 1) for t in range(model.seq_len)) / model.seq_len
    assert flops.attention == pytest.approx(layers * (4 * 2 * width**2 + causal))
    assert flops.training == 3 * flops.forward
    resident = dataclasses.replace(model, router_scope="resident")
    assert plan_cost.flops_per_token(resident, 0.5).experts == layers * model.top_k * one_expert
    with pytest.raises(ValueError, match="resident_share"):
        plan_cost.flops_per_token(model, 0)


def test_times_and_bandwidth_agree():
    """At the bandwidth that is said to be needed the utilization is the one asked for."""
    config = config_of("153m")
    placement = plan.job_placement(config)
    cost = plan_cost.round_cost(config, placement, wire.Link(1e9, 0.01), 1e13, 0)
    assert cost.meeting_s == pytest.approx(8 * cost.bytes_sent / 1e9 + cost.waits * 0.01)
    assert cost.waits == 1 + 1 + 2 + 1  # note, status, first share, last sum, hashes
    far = plan_cost.round_cost(config, placement, wire.Link(1e15, 0.01), 1e13, 0)
    assert far.meeting_s == pytest.approx((far.waits + far.waves) * 0.01)
    needed = plan_cost.bandwidth_needed(cost, 0.8, 0.01)
    again = plan_cost.round_cost(config, placement, wire.Link(needed, 0.01), 1e13, 0)
    assert again.utilization == pytest.approx(0.8)
    assert plan_cost.bandwidth_needed(cost, 0.999999, 1.0) is None
    for link, speed in ((wire.Link(0, 0), 1), (wire.Link(1, -1), 1), (wire.Link(1, 0), 0)):
        with pytest.raises(ValueError, match="bandwidth and flops_per_s must be > 0"):
            plan_cost.round_cost(config, placement, link, speed, 0)
    with pytest.raises(ValueError, match="utilization"):
        plan_cost.bandwidth_needed(cost, 1.0, 0)


def test_unknown_commands_are_refused(capsys):
    assert cli.main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0 and "plan" in capsys.readouterr().out


def test_overlap_hides_meetings():
    config = config_of(outer={"overlap": 4, "fragments": 2}, run={"local_steps": 16})
    placement, link = plan.job_placement(config), wire.Link(1e8, 0.01)
    cost = plan_cost.round_cost(config, placement, link, 1e10, 0)
    assert cost.hideable_s == pytest.approx(cost.local_s * 2 * 4 / 16)
    alone = dataclasses.replace(config, outer=dataclasses.replace(config.outer, overlap=0))
    bare = plan_cost.round_cost(alone, placement, link, 1e10, 0)
    assert bare.hidden_s == 0 and bare.meeting_s == cost.meeting_s
    shown = cost.meeting_s - cost.hideable_s
    assert cost.utilization == pytest.approx(cost.local_s / (cost.local_s + max(0, shown)))
    needed = plan_cost.bandwidth_needed(cost, 0.95, 0.01)
    assert needed < plan_cost.bandwidth_needed(bare, 0.95, 0.01)


# ---- a site of several ranks ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "resident"])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_a_site_of_the_same_memory_and_bytes(codec, ranks, scope):
    sites = {"sites": 2, "replication": 1}
    options = {"inner": {"batch_size": 12}, "outer": {"codec": codec, "bucket_bytes": 4096}}
    options["model"] = {"router_scope": scope}
    one = config_of(sites=sites, **options)
    many = config_of(sites=sites | {"ranks_per_site": ranks}, **options)
    placement = plan.job_placement(one)
    for site in range(2):
        of_ranks = plan_memory.rank_memories(many, placement, site)
        whole = plan_memory.job_memory(one, placement, site)
        assert len(of_ranks) == ranks
        assert [sum(parts) for parts in zip(*of_ranks, strict=True)] == list(whole)
        assert max(m.total for m in of_ranks) < 1.1 * whole.total / ranks
        assert plan_memory.job_memory(many, placement, site) == whole
        assert plan.meeting_bytes(many, placement, site) == plan.meeting_bytes(one, placement, site)


def test_replicas_hold_experts_again():
    sites = {"sites": 2, "replication": 1, "ranks_per_site": 4}
    options = {"inner": {"batch_size": 4}}
    once, twice = (config_of(sites=sites | {"replicas": n}, **options) for n in (1, 2))
    placement = plan.job_placement(once)
    more = [
        b - a
        for a, b in zip(
            plan_memory.job_memory(once, placement, 0),
            plan_memory.job_memory(twice, placement, 0),
            strict=True,
        )
    ]
    experts = 4 * plan_memory.site_parameters(once.model, placement, 0).sparse
    assert more[:3] == [experts, experts, 2 * experts] and not any(more[3:])


def test_ranks_hold_the_experts_that_a_load_says(tmp_path):
    model = config_of().model
    load = [[float(e == 0 or e == 1) for e in range(model.num_experts)]] * model.num_layers
    (tmp_path / "load.json").write_text(json.dumps(load))
    sites = {"sites": 1, "replication": 1, "ranks_per_site": 2}
    options = {"inner": {"batch_size": 2}}
    config = config_of(sites=sites | {"spread_by": tmp_path / "load.json"}, **options)
    placement = plan.job_placement(config)
    for first, second in plan.rank_experts(config, placement, 0):
        assert (0 in first) != (1 in first)
        assert sorted(first + second) == list(range(model.num_experts))
    assert plan.rank_experts(config_of(sites=sites, **options), placement, 0) is None
    (tmp_path / "load.json").write_text(json.dumps(load[1:]))
    with pytest.raises(ValueError, match="spread_by"):
        plan.rank_experts(config, placement, 0)


@pytest.mark.parametrize("scope", ["global", "resident"])
def test_experts_in_turns_are_spread_over_their_cycle(scope):
    """All rounds of a cycle together send every expert once and all else every time; a round of the
    plan is a third of that, and what it waits for are the buckets of the fullest."""
    shared = {"bucket_bytes": 40_000, "optimizer": "fedavg"}
    of = lambda **outer: config_of(
        sites={"sites": 4, "replication": 2},
        model={"router_scope": scope},
        outer={**shared, **outer},
    )
    every, turns = of(), of(expert_turns=3, turn_order="numbered")
    placement = plan.job_placement(every)
    rounds = [plan.meeting_bytes(turns, placement, 1, index) for index in (1, 2, 3)]
    assert rounds == [plan.meeting_bytes(turns, placement, 1, index) for index in (4, 5, 6)]
    assert plan_cost.sent_bytes(turns, placement, 1) == sum(rounds) // 3
    (elements,) = plan.site_elements(every, placement, 1)
    experts = {g: of_group.count * of_group.elements for g, of_group in elements.experts.items()}
    dense = elements._replace(parameters={(0, 1, 2, 3): elements.parameters[0, 1, 2, 3]})
    sent = lambda what: wire.round_bytes([what], 4, optimizer="fedavg", bucket_bytes=40_000)
    without = sum(n for g, n in elements.parameters.items() if g != (0, 1, 2, 3))
    assert sum(experts.values()) == without
    once = sent(elements) - sent(dense)
    note = plan.meeting_bytes(every, placement, 1) - sent(elements)
    # Hashes of buckets, and of groups, once per round instead of once.
    assert 0 <= sum(rounds) - 3 * (sent(dense) + note) - once < 0.01 * once
    waits = plan_cost.meeting_waits(turns, placement, 1)
    assert waits[0] == plan_cost.meeting_waits(every, placement, 1)[0] and waits[1] > 0
    counting = plan_cost.meeting_waits(of(expert_turns=3), placement, 1)
    assert counting == (waits[0] + 1, waits[1])


# ---- what limits meetings ------------------------------------------------------------------------


def test_what_limits_meetings():
    """By hand: the same round over links of which another thing is the worst."""
    of = lambda **options: config_of("54m", outer={"codec": "int4", **options})
    placement = plan.job_placement(of())
    cost = plan_cost.round_cost(of(), placement, wire.Link(1e9, 0.05), 1e14, 0)
    limit = lambda bandwidth, latency: cost.limit(wire.Link(bandwidth, latency))
    assert cost.waits == 5 and cost.waves == 7
    sending_s = 8 * cost.bytes_sent / 1e9
    assert limit(1e9, 0.99 * sending_s / 7) == "bandwidth"
    assert limit(1e9, 1.01 * sending_s / 7) == "latency x buckets"
    assert limit(1e9, 0.0) == "bandwidth"
    few = plan_cost.round_cost(of(in_flight=64), placement, wire.Link(1e9, 0.05), 1e14, 0)
    assert few.waves == 1 and few.limit(wire.Link(1e12, 0.05)) == "latency"
    # With overlap, a slow site and a fast link: nothing is waited for.
    hidden = plan_cost.round_cost(of(overlap=8), placement, wire.Link(1e9, 0.05), 1e12, 0)
    assert hidden.limit(wire.Link(1e9, 0.05)) == "nothing: hidden"
    alone = config_of(sites={"sites": 1, "replication": 1})
    cost = plan_cost.round_cost(alone, plan.job_placement(alone), wire.Link(1e9, 0.05), 1e13, 0)
    assert cost.bytes_sent == 0 and cost.limit(wire.Link(1e9, 0.05)) == "nothing"


def test_no_bandwidth_is_said_to_be_enough_where_latency_is_the_limit():
    """A share of the time is within reach of some bandwidth up to what latency alone leaves."""
    config = config_of("54m", outer={"codec": "int4"})
    placement = plan.job_placement(config)
    cost = plan_cost.round_cost(config, placement, wire.Link(1e9, 0.05), 1e14, 0)
    most = plan_cost.most_utilization(cost, 0.05)
    assert most == pytest.approx(cost.local_s / (cost.local_s + 12 * 0.05))
    assert plan_cost.bandwidth_needed(cost, most + 1e-6, 0.05) is None
    needed = plan_cost.bandwidth_needed(cost, most - 1e-6, 0.05)
    reached = plan_cost.round_cost(config, placement, wire.Link(needed, 0.05), 1e14, 0)
    assert reached.utilization == pytest.approx(most, abs=2e-6)


def test_no_more_than_a_round_is_hidden():
    """However many fragments are under way: there is one exchange at a time."""
    outer = {"fragments": 4, "overlap": 12}
    config = config_of(outer=outer, run={"local_steps": 16})
    cost = plan_cost.round_cost(config, plan.job_placement(config), wire.Link(1e3, 0.01), 1e13, 0)
    assert cost.meeting_s > cost.local_s and cost.hidden_s == cost.local_s
