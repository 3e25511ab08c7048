"""The figures of the FoMoE paper (arXiv 2606.19025), from the formulas as we have them."""

from __future__ import annotations

import dataclasses

import pytest

from fomoe_ext.config.job import TrainConfig, preset_config
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.plan import jobs as plan_jobs


def job(preset: str, sites: int, replication: int, **outer: object) -> TrainConfig:
    """A job of the paper: its partitioned router, whose rows travel with their experts."""
    config = preset_config(preset)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, router_scope="resident"),
        sites=dataclasses.replace(config.sites, sites=sites, replication=replication),
        outer=dataclasses.replace(config.outer, **outer),
    )


def sent(config: TrainConfig, rounds: int) -> float:
    """Bytes of one site in all, as figures 5 and 6 plot them."""
    of_round = plan_jobs.paper_figures(config)["bytes_sent"]
    return plan_cost.paper_cumulative_bytes(of_round, rounds)


@pytest.mark.parametrize(
    ("optimizer", "local_steps", "replication", "plotted"),
    [
        ("local-adamw", 128, 2, 1.30e9),
        ("diloco", 64, 2, 9.8e8),
        ("local-adamw", 128, 1, 1.25e9),
        ("local-adamw", 64, 1, 2.82e9),
        ("local-adamw", 32, 1, 5.96e9),
    ],
)
def test_cumulative_bytes_of_figures_5_and_6(optimizer, local_steps, replication, plotted):
    """The proxy of 54M parameters, two sites, 640 steps."""
    config = job("54m", 2, replication, optimizer=optimizer)
    assert sent(config, 640 // local_steps) == pytest.approx(plotted, rel=5e-3)


def test_cumulative_bytes_of_ddp():
    paper = plan_jobs.paper_figures(job("54m", 2, 2))
    per_step = paper["ddp_bytes"] / preset_config("54m").run.local_steps
    assert 640 * per_step == pytest.approx(7.0e10, rel=1e-2)


def test_142_and_4544():
    """What yields 1.42x: half of the sites hold each expert of a model with 59 % of its parameters
    in experts, reshuffled every round. Against DDP the 32 local steps come on top: 45.44x."""
    config = job("1.8b", 4, 2)
    random = {"placement": "random", "reshuffle_rounds": 1}
    config = dataclasses.replace(config, sites=dataclasses.replace(config.sites, **random))
    assert config.run.local_steps == 32
    paper = plan_jobs.paper_figures(config)
    assert paper["payload_ratio"] == pytest.approx(1.42, abs=5e-3)
    assert paper["ddp_ratio"] == pytest.approx(45.44, abs=0.15)
    assert paper["ddp_ratio"] == pytest.approx(32 * paper["payload_ratio"])


@pytest.mark.parametrize(
    ("replication", "memory", "ratio"),
    [(8, 1875, 1.0), (4, 1254, 1.61), (2, 944, 2.31), (1, 788, 2.96)],
)
def test_104b_on_eight_sites(replication, memory, ratio):
    paper = plan_jobs.paper_figures(job("104b", 8, replication))
    assert paper["memory"] == pytest.approx(memory * 1e9, rel=1e-3)
    assert paper["payload_ratio"] == pytest.approx(ratio, abs=5e-3)
    assert paper["full_replica_memory"] == pytest.approx(1875e9, rel=1e-3)
    assert paper["memory_ratio"] == pytest.approx(1875 / memory, rel=1e-3)


def test_moments_triple_the_payload_and_a_global_router_is_dense():
    plain = plan_jobs.paper_figures(job("153m", 4, 2))["bytes_sent"]
    moments = plan_jobs.paper_figures(job("153m", 4, 2, optimizer="local-adamw"))["bytes_sent"]
    assert moments == pytest.approx(3 * plain)
    config = job("153m", 4, 2)
    everywhere = dataclasses.replace(config.model, router_scope="global")
    more = plan_jobs.paper_figures(dataclasses.replace(config, model=everywhere))["bytes_sent"]
    rows = config.model.num_layers * config.model.num_experts * config.model.hidden_size
    # 2 (M - 1) / M of every row instead of 2 (O - 1) / O of half of them, in bf16.
    assert more - plain == pytest.approx(2 * rows * (1.5 - 0.5))
    with pytest.raises(ValueError, match="replication"):
        plan_cost.paper_round_bytes(1, 1, 2, 3)
