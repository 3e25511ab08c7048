"""What frozen copies of experts cost."""

from __future__ import annotations

import pytest

from fomoe_ext.placement import wire
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.plan import memory as plan_memory
from fomoe_ext.plan import traffic as plan
from fomoe_ext.report.runs import job_config


def test_the_cost_model_by_hand():
    shared = ["--sites", "4", "--replication", "1", "--router-scope", "global"]
    config = job_config([*shared, "--stale-experts", "3", "--stale-codec", "bf16"])
    model, placement = config.model, plan.job_placement(config)
    one = 3 * model.hidden_size * model.intermediate_size
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
    cost = plan_cost.round_cost(config, placement, wire.Link(1e9, 0.01), 1e13, 0)
    least = plan_cost.round_cost(plain, placement, wire.Link(1e9, 0.01), 1e13, 0)
    assert cost.waits == least.waits + 1 and cost.bytes_sent == least.bytes_sent + sent[0]
    assert cost.flops > least.flops and cost.memory == least.memory + memory.stale_copies
