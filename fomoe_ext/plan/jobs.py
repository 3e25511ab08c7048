"""Jobs side by side: the cost of a round of each at a site. Needs no torch.

The planned job ("FoMoE", with fp32 and with other codecs) is compared with others of the same
model, steps and batches: plain DDP; a full replica at every site, as in DiLoCo (arXiv 2311.08105);
and a job in the style of SPES (arXiv 2602.11543), where every site stores and computes all experts
but trains only those that it owns alone.
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
"""Codecs that are compared, in addition to fp32 and the job's own."""
UTILIZATIONS = (0.50, 0.75, 0.90, 0.95, 0.99)
"""Shares of the time in local steps for which a plan gives the bandwidth needed."""


class JobCost(NamedTuple):
    """The cost of a job's round at the site that sends most.

    rank_memory: bytes at the fullest rank of all sites. meeting_memory: bytes that a rank needs in
    addition during meetings. sent_by_all: bytes that all sites send. tokens: those that all sites
    train on.
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
        """Bytes that all sites send per training token: the paper's BPT."""
        return self.sent_by_all / self.tokens

    @property
    def peak_memory(self) -> int:
        """Bytes at the fullest rank during a meeting, without activations."""
        return self.rank_memory + self.meeting_memory

    def as_dict(self, link: Link) -> dict[str, Any]:
        """Plain data. bandwidth_needed: bits per second for each of `UTILIZATIONS`, None if the
        latency alone takes too long."""
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
    """The same job with another codec, and that codec's default for AdamW moments."""
    outer = dataclasses.replace(config.outer, codec=codec, moment_codecs=())
    return dataclasses.replace(config, outer=outer)


def with_replication(config: TrainConfig, replication: int) -> TrainConfig:
    """The same job with another replication, and no more frozen copies than absent experts."""
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
    """Replications with which all sites hold equally many experts; one for a placement_file."""
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
    """Frozen copies of all experts that a site does not own, in fp32, without outer optimizer. None
    if the experts cannot be divided evenly among the sites."""
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
    """By name: DDP, a full replica, SPES-style, and the job with fp32, its own and other codecs.

    SPES-style is missing if the experts cannot be divided evenly among the sites.
    """
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
    """The name that plans give to a job with partial replicas and this codec."""
    return "FoMoE" if codec == "fp32" else f"FoMoE, {codec}"


def job_cost(
    config: TrainConfig, link: Link, flops_per_s: float, placement: Placement | None = None
) -> JobCost:
    """The cost of a job at the site that sends most.

    `flops_per_s`: what a site reaches in training. `placement`: None = the one that the job starts
    with. Raises what `job_placement` and `round_cost` raise.
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
    """The costs of `compared_jobs`, by name.

    SPES-style is planned with one rank per site; for a site of several ranks its memory is divided
    by their number.
    """
    for name, job in compared_jobs(config).items():
        cost = job_cost(job, link, flops_per_s)
        ranks = config.sites.ranks_per_site
        if job.sites.ranks_per_site != ranks:
            cost = cost._replace(rank_memory=-(-cost.memory.total // ranks))
        yield name, cost


def paper_figures(config: TrainConfig) -> dict[str, float]:
    """Bytes per site and round and memory per site by the paper's formulas, for the job and for a
    full replica, and their ratios. Payloads are bf16, and a parameter takes 18 bytes of memory.
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
