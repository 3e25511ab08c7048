"""`fomoe plan`: what a job would cost, before anything is trained. Needs no torch.

The job planned for stands beside others of the same model, steps and batches: plain DDP, the same
with all experts everywhere, and the same with other codecs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from fomoe_ext import plan, plan_cost, plan_memory, wire
from fomoe_ext.config import TrainConfig, count_parameters
from fomoe_ext.config_io import parse_args
from fomoe_ext.metrics import human_bytes, human_count
from fomoe_ext.placement import Placement
from fomoe_ext.report import ReportTable, arithmetic_table, print_tables, shown_parts

_CODECS = ("bf16", "int8", "int4", "topk")
UTILIZATIONS = (0.50, 0.75, 0.90, 0.95, 0.99)
"""Shares of the time in local steps for which the bandwidth is asked."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """A site's connection and speed, for the times; every other flag is one of `fomoe train`."""

    bandwidth_gbit: float = 1.0
    """What a site can send, in 10^9 bits per second."""
    latency_ms: float = 50.0
    """From one site to another, in milliseconds."""
    tflops: float = 100.0
    """What a site reaches in training, in 10^12 operations per second."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        if not (self.bandwidth_gbit > 0 and self.tflops > 0 and self.latency_ms >= 0):
            raise ValueError(
                "bandwidth_gbit and tflops must be > 0 and latency_ms >= 0, got "
                f"{self.bandwidth_gbit}, {self.tflops} and {self.latency_ms}"
            )

    @property
    def link(self) -> wire.Link:
        """The connection in bits per second and seconds."""
        return wire.Link(self.bandwidth_gbit * 1e9, self.latency_ms * 1e-3)


def compared_jobs(config: TrainConfig) -> dict[str, TrainConfig]:
    """The job beside DDP, a full replica and itself with other codecs, by name."""
    replica = plan.full_replica(config)
    outer = dataclasses.replace
    jobs = {
        "DDP": outer(
            replica,
            outer=outer(
                config.outer,
                optimizer="ddp",
                codec="fp32",
                expert_mean="equal",
                fragments=1,
                overlap=0,
            ),
        ),
        "full replica": replica,
        "this job": config,
    }
    for codec in _CODECS:
        if config.outer.codec != codec:
            jobs[f"this job, {codec}"] = outer(config, outer=outer(config.outer, codec=codec))
    return jobs


def _busiest_site(config: TrainConfig, placement: Placement) -> int:
    sites = range(placement.num_sites)
    return max(sites, key=lambda site: plan.meeting_bytes(config, placement, site))


def make_plan(config: TrainConfig, options: PlanOptions) -> dict[str, Any]:
    """Everything `fomoe plan` tells, as plain data: costs per round of the busiest site, by job.

    Raises what `plan.job_placement` raises.
    """
    jobs: dict[str, Any] = {}
    for name, job in compared_jobs(config).items():
        placement = plan.job_placement(job)
        site = _busiest_site(job, placement)
        cost = plan_cost.round_cost(job, placement, options.link, options.tflops * 1e12, site)
        memory = plan_memory.job_memory(job, placement, site)
        needed = {
            f"{share:.0%}": plan_cost.bandwidth_needed(cost, share, options.link.latency)
            for share in UTILIZATIONS
        }
        jobs[name] = {
            **cost._asdict(),
            "hidden_s": cost.hidden_s,
            "utilization": cost.utilization,
            "memory_parts": memory._asdict(),
            "rank_memory": max(m.total for m in plan_memory.rank_memories(job, placement, site)),
            "bandwidth_needed": needed,
        }
    counts = count_parameters(config.model)
    share = config.sites.replication / config.sites.sites
    flops = {
        "full replica": plan_cost.flops_per_token(config.model),
        "this job": plan_cost.flops_per_token(config.model, share, plan.stale_share(config)),
    }
    return {
        "preset": config.preset,
        "parameters": {"total": counts.total, "experts": counts.sparse},
        "sites": config.sites.sites,
        "ranks_per_site": config.sites.ranks_per_site,
        "replication": config.sites.replication,
        "local_steps": config.run.local_steps,
        "rounds": config.run.resolved_rounds,
        "tokens_per_round": config.inner.batch_size * config.model.seq_len * config.run.local_steps,
        "options": dataclasses.asdict(options),
        "jobs": jobs,
        "flops_per_token": {
            kind: {**row._asdict(), "forward": row.forward, "training": row.training}
            for kind, row in flops.items()
        },
    }


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _bandwidth(bits_per_s: float | None) -> str:
    return "by none" if bits_per_s is None else f"{human_count(bits_per_s)}bit/s"


def plan_tables(planned: Mapping[str, Any]) -> list[ReportTable]:
    """The tables of a plan."""
    jobs, options = planned["jobs"], planned["options"]
    ddp = jobs["DDP"]["bytes_sent"]
    cost = ReportTable(
        f"A round of {planned['local_steps']} local steps, per site",
        ("", "sent", "vs DDP", "memory", "local steps", "meetings", "hidden", "utilization"),
        tuple(
            (
                name,
                human_bytes(job["bytes_sent"]),
                f"{ddp / job['bytes_sent']:.2f}x" if job["bytes_sent"] else "-",
                human_bytes(job["memory"]),
                _duration(job["local_s"]),
                _duration(job["meeting_s"]),
                f"{job['hidden_s'] / job['meeting_s']:.0%}" if job["meeting_s"] else "-",
                f"{job['utilization']:.1%}",
            )
            for name, job in jobs.items()
        ),
        f"{planned['preset']}: {human_count(planned['parameters']['total'])} parameters, "
        f"{planned['parameters']['experts'] / planned['parameters']['total']:.0%} in experts; "
        f"{planned['sites']} sites, replication {planned['replication']}, "
        f"{human_count(planned['tokens_per_round'])} tokens per site and round, "
        f"{planned['rounds']} rounds. Times at {options['bandwidth_gbit']:g} Gbit/s, "
        f"{options['latency_ms']:g} ms and {options['tflops']:g} TFLOP/s, of the site that "
        "sends most; hidden: behind local steps (--overlap).",
    )
    first = next(iter(jobs.values()))
    bandwidth = ReportTable(
        "Bandwidth needed for a share of the time in local steps",
        ("", *first["bandwidth_needed"]),
        tuple(
            (name, *map(_bandwidth, job["bandwidth_needed"].values())) for name, job in jobs.items()
        ),
        f"At {options['latency_ms']:g} ms; by none: latency alone takes more.",
    )
    several = planned["ranks_per_site"] > 1
    parts = shown_parts([job["memory_parts"] for job in jobs.values()])
    memory = ReportTable(
        "Memory per site, without activations",
        (
            "",
            *(part.replace("_", " ") for part in parts),
            *(["of a rank, at most"] if several else []),
        ),
        tuple(
            (
                name,
                *(human_bytes(job["memory_parts"][part]) for part in parts),
                *([human_bytes(job["rank_memory"])] if several else []),
            )
            for name, job in jobs.items()
        ),
        f"A site has {planned['ranks_per_site']} ranks." if several else "",
    )
    return [cost, bandwidth, memory, arithmetic_table(planned["flops_per_token"])]


def main(arguments: Sequence[str]) -> int:
    """`fomoe plan [flags]`; returns the exit code.

    Raises ValueError and OSError for bad values and files; SystemExit as `parse_args`.
    """
    import tyro

    args = list(arguments)
    if "-h" in args or "--help" in args:
        try:
            tyro.cli(PlanOptions, prog="fomoe plan", args=["--help"])
        except SystemExit:
            print()
        parse_args(["--help"], "fomoe plan")
    options, rest = tyro.cli(PlanOptions, prog="fomoe plan", args=args, return_unknown_args=True)
    planned = make_plan(parse_args(rest, "fomoe plan"), options)
    if options.json:
        print(json.dumps(planned, indent=1))
    else:
        print_tables(plan_tables(planned), Console(file=sys.stdout))
    return 0
