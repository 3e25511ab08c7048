"""Jobs side by side: what a round of each costs a site. Needs no torch.

The job planned for ("FoMoE", with fp32 and with other codecs) stands beside others of the same
model, steps and batches: plain DDP; a full replica on every site, as DiLoCo (arXiv 2311.08105) has;
and one in the manner of SPES (arXiv 2602.11543), where every site stores and computes all experts,
and trains those of which it is the only owner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.placement.placement import Placement
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan.cost import (
    RoundCost,
    bandwidth_needed,
    most_utilization,
    paper_memory_bytes,
    paper_round_bytes,
    round_cost,
    sent_bytes,
)
from fomoe_ext.plan.memory import SiteMemory, job_memory, meeting_memory, rank_memories
from fomoe_ext.plan.sizes import sizes_of
from fomoe_ext.plan.traffic import bucket_bytes, full_replica, job_placement

CODECS = ("bf16", "int8", "int4", "int2", "topk")
"""Codecs that stand beside fp32 and the job's own."""
UTILIZATIONS = (0.50, 0.75, 0.90, 0.95, 0.99)
"""Shares of the time in local steps for which the bandwidth is asked."""


class JobCost(NamedTuple):
    """A job's round, of the site that sends most.

    rank_memory: bytes on the fullest rank of all sites. meeting_memory: bytes that a rank needs
    besides, during meetings. sent_by_all: bytes of all sites. tokens: of all sites.
    """

    config: TrainConfig
    round: RoundCost
    memory: SiteMemory
    rank_memory: int
    meeting_memory: int
    sent_by_all: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes that all sites send per token that they train on: the paper's BPT."""
        return self.sent_by_all / self.tokens

    @property
    def peak_memory(self) -> int:
        """Bytes on the fullest rank while sites meet, without activations."""
        return self.rank_memory + self.meeting_memory

    def as_dict(self, link: Link) -> dict[str, Any]:
        """Plain data, with the bandwidth needed (bits per second; None = latency alone takes
        more)."""
        return {
            **self.round._asdict(),
            "seconds": self.round.seconds,
            "hidden_s": self.round.hidden_s,
            "utilization": self.round.utilization,
            "bytes_of_all_sites": self.sent_by_all,
            "bytes_per_token": self.bytes_per_token,
            "memory_parts": self.memory._asdict(),
            "rank_memory": self.rank_memory,
            "meeting_memory": self.meeting_memory,
            "bucket_bytes": bucket_bytes(self.config),
            "limit": self.round.limit(link),
            "most_utilization": most_utilization(self.round, link.latency),
            "bandwidth_needed": {
                f"{share:.0%}": bandwidth_needed(self.round, share, link.latency)
                for share in UTILIZATIONS
            },
        }


def with_codec(config: TrainConfig, codec: str) -> TrainConfig:
    """The same job with another codec; moments travel as they do by default with it."""
    outer = dataclasses.replace(config.outer, codec=codec, moment_codecs=())
    return dataclasses.replace(config, outer=outer)


def with_replication(config: TrainConfig, replication: int) -> TrainConfig:
    """The same job with other experts per site, and at most as many frozen copies as are absent."""
    absent = config.model.num_experts * (config.sites.sites - replication) // config.sites.sites
    stale = min(config.sites.stale_experts, absent)
    sites = dataclasses.replace(
        config.sites,
        replication=replication,
        stale_experts=stale,
        stale_by=config.sites.stale_by if stale > 0 else None,
    )
    return dataclasses.replace(config, sites=sites)


def possible_replications(config: TrainConfig) -> list[int]:
    """Replications with which every site holds as many experts; a placement_file has one."""
    sites, experts = config.sites.sites, config.model.num_experts
    if config.sites.placement_file is not None:
        return [config.sites.replication]
    return [r for r in range(1, sites + 1) if experts * r % sites == 0]


def _ddp(config: TrainConfig) -> TrainConfig:
    outer = dataclasses.replace(
        config.outer,
        optimizer="ddp",
        codec="fp32",
        moment_codecs=(),
        expert_mean="equal",
        clip_delta=0.0,
        fragments=1,
        overlap=0,
        expert_turns=1,
    )
    inner = dataclasses.replace(config.inner, uneven_steps=False)
    return dataclasses.replace(full_replica(config), inner=inner, outer=outer)


def _full_replica(config: TrainConfig) -> TrainConfig:
    job = with_codec(full_replica(config), "fp32")
    optimizer = "diloco" if job.outer.optimizer == "ddp" else job.outer.optimizer
    outer = dataclasses.replace(job.outer, optimizer=optimizer, expert_turns=1)
    return dataclasses.replace(job, outer=outer)


def _spes(config: TrainConfig) -> TrainConfig | None:
    """Frozen copies of all experts that a site does not own, fp32, no outer optimizer. None where
    experts cannot be shared out evenly among so many owners."""
    if config.model.num_experts % config.sites.sites:
        return None
    sites = dataclasses.replace(
        full_replica(config).sites,
        replication=1,
        stale_experts=-1 if config.sites.sites > 1 else 0,
        ranks_per_site=1,
        replicas=1,
        spread_by=None,
    )
    outer = dataclasses.replace(
        config.outer,
        optimizer="fedavg",
        outer_momentum=None,
        codec="fp32",
        moment_codecs=(),
        stale_codec="fp32",
        stale_period=1,
        fragments=1,
        overlap=0,
        expert_turns=1,
    )
    model = dataclasses.replace(config.model, router_scope="global")
    return dataclasses.replace(config, model=model, sites=sites, outer=outer)


def compared_jobs(config: TrainConfig) -> dict[str, TrainConfig]:
    """By name: DDP, a full replica, SPES-style, and the job with fp32, its own and other codecs."""
    jobs = {"DDP": _ddp(config), "full replica": _full_replica(config)}
    spes = _spes(config)
    if spes is not None:
        jobs["SPES-style"] = spes
    jobs[job_name("fp32")] = with_codec(config, "fp32")
    own = config.outer.codec
    for codec in CODECS if own in ("fp32", *CODECS) else (own, *CODECS):
        jobs[job_name(codec)] = config if codec == own else with_codec(config, codec)
    if own == "fp32":
        jobs[job_name(own)] = config
    return jobs


def job_name(codec: str) -> str:
    """What a job with partial replicas and this codec is called in plans."""
    return "FoMoE" if codec == "fp32" else f"FoMoE, {codec}"


def job_cost(
    config: TrainConfig, link: Link, flops_per_s: float, placement: Placement | None = None
) -> JobCost:
    """The cost of a job on the site that sends most. `flops_per_s`: of a site, in training.

    Raises what `job_placement` and `round_cost` raise.
    """
    placement = job_placement(config) if placement is None else placement
    sent = [sent_bytes(config, placement, site) for site in range(placement.num_sites)]
    site = sent.index(max(sent))
    memories = [job_memory(config, placement, s) for s in range(placement.num_sites)]
    ranks = memories
    if config.sites.ranks_per_site > 1:
        ranks = [
            of_rank
            for s in range(placement.num_sites)
            for of_rank in rank_memories(config, placement, s)
        ]
    local_tokens = config.inner.batch_size * config.model.seq_len * config.run.local_steps
    return JobCost(
        config,
        round_cost(config, placement, link, flops_per_s, site),
        memories[site],
        max(memory.total for memory in ranks),
        meeting_memory(config, placement, site),
        sum(sent),
        local_tokens * placement.num_sites,
    )


def compared_costs(
    config: TrainConfig, link: Link, flops_per_s: float
) -> Iterator[tuple[str, JobCost]]:
    """Costs of `compared_jobs`. A site of several ranks shares SPES's memory evenly among them."""
    for name, job in compared_jobs(config).items():
        cost = job_cost(job, link, flops_per_s)
        ranks = config.sites.ranks_per_site
        if job.sites.ranks_per_site != ranks:
            cost = cost._replace(rank_memory=-(-cost.memory.total // ranks))
        yield name, cost


def paper_figures(config: TrainConfig) -> dict[str, float]:
    """What the paper's own formulas say of a job (bf16 payloads, 18 bytes per parameter in memory),
    and of a full replica: bytes per site and round, memory per site, and their ratios.
    """
    counts, sites = sizes_of(config.model).counts, config.sites
    routers = counts.router if config.model.router_scope == "resident" else 0
    dense, sparse = counts.total - counts.sparse - routers, counts.sparse + routers
    moments = config.outer.optimizer == "local-adamw"
    every = sites.reshuffle_rounds

    def sent(replication: int) -> float:
        return paper_round_bytes(
            dense,
            sparse,
            sites.sites,
            replication,
            reshuffles_per_round=1 / every if every else 0.0,
            moments=moments,
        )

    def held(replication: int) -> float:
        return paper_memory_bytes(dense, sparse, sites.sites, replication)

    own, full = sent(sites.replication), sent(sites.sites)
    memory, whole = held(sites.replication), held(sites.sites)
    gradients = paper_round_bytes(dense, sparse, sites.sites, sites.sites)
    return {
        "bytes_sent": own,
        "full_replica_bytes": full,
        "ddp_bytes": config.run.local_steps * gradients,
        "payload_ratio": full / own if own else 1.0,
        "ddp_ratio": config.run.local_steps * gradients / own if own else 1.0,
        "memory": memory,
        "full_replica_memory": whole,
        "memory_ratio": whole / memory,
    }
