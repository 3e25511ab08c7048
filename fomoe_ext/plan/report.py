"""What `fomoe plan` tells: plain data, and tables made of nothing else. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan.cost import flops_per_token
from fomoe_ext.plan.jobs import JobCost, compared_costs, job_name, paper_figures
from fomoe_ext.plan.sizes import sizes_of
from fomoe_ext.plan.traffic import stale_share
from fomoe_ext.report.report import arithmetic_table
from fomoe_ext.report.tables import ReportTable, shown_parts
from fomoe_ext.report.units import human_bytes, human_count


def make_plan(
    config: TrainConfig,
    link: Link,
    flops_per_s: float,
    *,
    name: str | None = None,
    costs: Mapping[str, JobCost] | None = None,
) -> dict[str, Any]:
    """Everything `fomoe plan` tells, as plain data: costs per round of the busiest site, by job.

    `flops_per_s`: what a site reaches in training. `name`: of the model, None = the preset.
    `costs`: `compared_costs`, if they are known already. Raises what `job_placement` raises.
    """
    if costs is None:
        costs = dict(compared_costs(config, link, flops_per_s))
    sizes = sizes_of(config.model)
    counts, share = sizes.counts, config.sites.replication / config.sites.sites
    flops = {
        "full replica": flops_per_token(config.model),
        "this job": flops_per_token(config.model, share, stale_share(config)),
    }
    tokens = config.inner.batch_size * config.model.seq_len * config.run.local_steps
    return {
        "model": config.preset if name is None else name,
        "parameters": {
            "total": counts.total,
            "dense": counts.dense,
            "experts": counts.sparse,
            "routers": counts.router,
        },
        "sites": config.sites.sites,
        "ranks_per_site": config.sites.ranks_per_site,
        "replication": config.sites.replication,
        "router_scope": config.model.router_scope,
        "optimizer": config.outer.optimizer,
        "codec": config.outer.codec,
        "local_steps": config.run.local_steps,
        "rounds": config.run.resolved_rounds,
        "tokens_per_round": tokens,
        "link": {"bandwidth": link.bandwidth, "latency": link.latency},
        "flops_per_s": flops_per_s,
        "job": job_name(config.outer.codec),
        "jobs": {job: cost.as_dict(link.latency) for job, cost in costs.items()},
        "paper": paper_figures(config),
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


def _marked(planned: Mapping[str, Any], name: str) -> str:
    return f"{name} *" if name == planned["job"] else name


def _cost_table(planned: Mapping[str, Any]) -> ReportTable:
    jobs, link, counts = planned["jobs"], planned["link"], planned["parameters"]
    ddp = jobs["DDP"]["bytes_sent"]
    rows = tuple(
        (
            _marked(planned, name),
            human_bytes(job["bytes_sent"]),
            f"{ddp / job['bytes_sent']:.2f}x" if job["bytes_sent"] else "-",
            f"{job['bytes_per_token']:.3g}",
            human_bytes(job["memory"]),
            _duration(job["local_s"]),
            _duration(job["meeting_s"]),
            f"{job['hidden_s'] / job['meeting_s']:.0%}" if job["meeting_s"] else "-",
            f"{job['utilization']:.1%}",
        )
        for name, job in jobs.items()
    )
    columns = ("sent", "vs DDP", "bytes/token", "memory", "local steps", "meetings", "hidden")
    return ReportTable(
        f"A round of {planned['local_steps']} local steps, per site",
        ("", *columns, "utilization"),
        rows,
        f"{planned['model']}: {human_count(counts['total'])} parameters, "
        f"{human_count(counts['experts'])} in experts ({counts['experts'] / counts['total']:.0%}), "
        f"{human_count(counts['dense'])} dense, {human_count(counts['routers'])} in routers; "
        f"{planned['sites']} sites, * is this job: replication {planned['replication']}, "
        f"{planned['optimizer']}, {planned['codec']}; "
        f"{human_count(planned['tokens_per_round'])} tokens per site and round, "
        f"{planned['rounds']} rounds. Times at {link['bandwidth'] / 1e9:g} Gbit/s, "
        f"{link['latency'] * 1e3:g} ms and {planned['flops_per_s'] / 1e12:.4g} TFLOP/s, of the "
        "site that sends most. Bytes/token: of all sites, per token. Hidden: behind local steps "
        "(--overlap). SPES-style: every site stores and computes all experts, trains its own.",
    )


def _bandwidth_table(planned: Mapping[str, Any]) -> ReportTable:
    jobs = planned["jobs"]
    first = next(iter(jobs.values()))
    return ReportTable(
        "Bandwidth needed for a share of the time in local steps",
        ("", *first["bandwidth_needed"]),
        tuple(
            (_marked(planned, name), *map(_bandwidth, job["bandwidth_needed"].values()))
            for name, job in jobs.items()
        ),
        f"At {planned['link']['latency'] * 1e3:g} ms; by none: latency alone takes more.",
    )


def _memory_table(planned: Mapping[str, Any]) -> ReportTable:
    jobs, several = planned["jobs"], planned["ranks_per_site"] > 1
    parts = shown_parts([job["memory_parts"] for job in jobs.values()])
    return ReportTable(
        "Memory per site, without activations",
        (
            "",
            *(part.replace("_", " ") for part in parts),
            "total",
            *(["of a rank, at most"] if several else []),
        ),
        tuple(
            (
                _marked(planned, name),
                *(human_bytes(job["memory_parts"][part]) for part in parts),
                human_bytes(job["memory"]),
                *([human_bytes(job["rank_memory"])] if several else []),
            )
            for name, job in jobs.items()
        ),
        f"A site has {planned['ranks_per_site']} ranks." if several else "",
    )


def _paper_table(planned: Mapping[str, Any]) -> ReportTable:
    paper = planned["paper"]
    return ReportTable(
        "By the formulas of the FoMoE paper",
        ("", "sent", "vs DDP", "memory"),
        (
            ("DDP", human_bytes(paper["ddp_bytes"]), "1.00x", ""),
            (
                "full replica",
                human_bytes(paper["full_replica_bytes"]),
                f"{paper['ddp_ratio'] / paper['payload_ratio']:.2f}x",
                human_bytes(paper["full_replica_memory"]),
            ),
            (
                "this job",
                human_bytes(paper["bytes_sent"]),
                f"{paper['ddp_ratio']:.2f}x",
                human_bytes(paper["memory"]),
            ),
        ),
        f"arXiv 2606.19025: payloads in bf16, no codec, 18 bytes of memory per parameter. A full "
        f"replica sends {paper['payload_ratio']:.2f}x of this job.",
    )


def plan_tables(planned: Mapping[str, Any]) -> list[ReportTable]:
    """The tables of a plan."""
    makers = (_cost_table, _bandwidth_table, _memory_table, _paper_table)
    tables = [make(planned) for make in makers]
    return [*tables, arithmetic_table(planned["flops_per_token"])]
