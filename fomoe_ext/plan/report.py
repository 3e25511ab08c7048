"""The result of `fomoe plan`: plain data, and tables made from it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.placement.overlap import AUTO, reason
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan.cost import LIMITS, flops_per_token
from fomoe_ext.plan.disk import checkpoint_size
from fomoe_ext.plan.jobs import JobCost, compared_costs, job_name, paper_figures
from fomoe_ext.plan.sizes import sizes_of
from fomoe_ext.plan.traffic import job_placement, stale_share
from fomoe_ext.report.report import arithmetic_table
from fomoe_ext.report.tables import ReportTable
from fomoe_ext.report.units import human_bytes, human_count


def make_plan(
    config: TrainConfig,
    link: Link,
    flops_per_s: float,
    *,
    name: str | None = None,
    costs: Mapping[str, JobCost] | None = None,
) -> dict[str, Any]:
    """The result of `fomoe plan` as plain data: for each job, the cost of a round at the site that
    sends most.

    `flops_per_s`: what a site reaches in training. `name`: of the model, None = the preset.
    `costs`: the result of `compared_costs`, if it is known. Raises what `job_placement` raises.
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
        "fragments": config.outer.fragments,
        "overlap": config.outer.overlap,
        "rounds": config.run.resolved_rounds,
        "tokens_per_round": tokens,
        "link": {"bandwidth": link.bandwidth, "latency": link.latency},
        "flops_per_s": flops_per_s,
        "job": job_name(config.outer.codec),
        "jobs": {job: cost.as_dict(link) for job, cost in costs.items()},
        "checkpoint": checkpoint_size(config, job_placement(config))._asdict(),
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


def _marked(planned: Mapping[str, Any], name: str) -> str:
    return f"{name} *" if name == planned["job"] else name


def _cost_table(planned: Mapping[str, Any]) -> ReportTable:
    jobs, counts = planned["jobs"], planned["parameters"]
    ddp = jobs["DDP"]["bytes_sent"]
    rows = tuple(
        (
            _marked(planned, name),
            human_bytes(job["bytes_sent"]),
            f"{ddp / job['bytes_sent']:.2f}x" if job["bytes_sent"] else "-",
            f"{job['bytes_per_token']:.3g}",
            human_bytes(job["memory"]),
            f"{job['utilization']:.1%}",
        )
        for name, job in jobs.items()
    )
    return ReportTable(
        f"A round of {planned['local_steps']} local steps, per site",
        ("", "sent", "vs DDP", "bytes/token", "memory", "utilization"),
        rows,
        f"{planned['model']}: {human_count(counts['total'])} parameters, "
        f"{human_count(counts['experts'])} in experts ({counts['experts'] / counts['total']:.0%}), "
        f"{human_count(counts['dense'])} dense, {human_count(counts['routers'])} in routers; "
        f"{planned['sites']} sites, * is this job: replication {planned['replication']}, "
        f"{planned['optimizer']}, {planned['codec']}; "
        f"{human_count(planned['tokens_per_round'])} tokens per site and round, "
        f"{planned['rounds']} rounds. Figures are those of the site that sends most; bytes/token: "
        "bytes of all sites per training token. Utilization: share of the time in local steps. "
        "SPES-style: every site stores and computes all experts and trains its own.",
    )


def _time_table(planned: Mapping[str, Any]) -> ReportTable:
    jobs, link = planned["jobs"], planned["link"]
    rows = tuple(
        (
            _marked(planned, name),
            _duration(job["local_s"]),
            _duration(job["meeting_s"]),
            f"{job['hidden_s'] / job['meeting_s']:.0%}" if job["meeting_s"] else "-",
            job["limit"],
            f"{job['bucket_bytes'] / 2**20:.3g} MiB",
        )
        for name, job in jobs.items()
    )
    found = dict.fromkeys(job["limit"] for job in jobs.values())
    limits = "".join(f" {name}: {LIMITS[name]}." for name in LIMITS if name in found)
    chosen = ""
    if planned["overlap"] == AUTO:
        own = jobs[planned["job"]]
        exchange = own["meeting_s"] / planned["fragments"] / own["local_s"] * planned["local_steps"]
        steps, fragments = planned["local_steps"], planned["fragments"]
        chosen = f" Chosen: {reason(own['overlap'], exchange, steps, fragments)}."
    return ReportTable(
        "Time of a round, and what limits the meetings",
        ("", "local steps", "meetings", "hidden", "limited by", "buckets"),
        rows,
        f"At {link['bandwidth'] / 1e9:g} Gbit/s, {link['latency'] * 1e3:g} ms and "
        f"{planned['flops_per_s'] / 1e12:.4g} TFLOP/s; time to encode is not counted. Hidden: "
        f"share of the meetings that overlaps with local steps (--overlap).{chosen} Limited "
        f"by{limits}",
    )


def _bandwidth(needed: float | None, most: float) -> str:
    """A bandwidth, or if none is enough the highest possible utilization, rounded down."""
    if needed is not None:
        return f"{human_count(needed)}bit/s"
    return f"max {math.floor(1000 * most) / 10:.1f}%"


def _bandwidth_table(planned: Mapping[str, Any]) -> ReportTable:
    jobs = planned["jobs"]
    first = next(iter(jobs.values()))
    return ReportTable(
        "Bandwidth needed for a share of the time in local steps",
        ("", *first["bandwidth_needed"]),
        tuple(
            (
                _marked(planned, name),
                *(_bandwidth(n, job["most_utilization"]) for n in job["bandwidth_needed"].values()),
            )
            for name, job in jobs.items()
        ),
        f"At a latency of {planned['link']['latency'] * 1e3:g} ms. max: the largest share that "
        "this latency allows, with any bandwidth.",
    )


def _memory_table(planned: Mapping[str, Any]) -> ReportTable:
    jobs, several = planned["jobs"], planned["ranks_per_site"] > 1
    # Memory depends on the codec only by error feedback, so one lossy codec is enough.
    own = planned["job"] if planned["codec"] != "fp32" else job_name("int4")
    names = [n for n in jobs if n in ("DDP", "full replica", "SPES-style", job_name("fp32"), own)]
    shown = [jobs[name] for name in names]
    parts = [
        part for part in shown[0]["memory_parts"] if any(j["memory_parts"][part] for j in shown)
    ]
    rows = [
        (part.replace("_", " "), *(human_bytes(j["memory_parts"][part]) for j in shown))
        for part in parts
    ]
    rows.append(("total", *(human_bytes(job["memory"]) for job in shown)))
    if several:
        rows.append(("fullest rank", *(human_bytes(job["rank_memory"]) for job in shown)))
    rows.append(("more in meetings", *(human_bytes(job["meeting_memory"]) for job in shown)))
    ranks = f"A site has {planned['ranks_per_site']} ranks. " if several else ""
    return ReportTable(
        "Memory per site, without activations",
        ("", *(_marked(planned, name) for name in names)),
        tuple(rows),
        f"{ranks}In meetings: buckets on their way{', at a rank' if several else ''}.",
    )


def _disk_table(planned: Mapping[str, Any]) -> ReportTable:
    parts = planned["checkpoint"]
    shown = {part: size for part, size in parts.items() if size}
    return ReportTable(
        "A checkpoint of this job, on disk",
        ("", *(part.replace("_", " ") for part in shown), "total"),
        (("all sites", *map(human_bytes, shown.values()), human_bytes(sum(parts.values()))),),
        "Model: every expert once. Inner state (moments) and error feedback: of each site, so that "
        "a resumed run gives the same bits.",
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
    makers = (_cost_table, _time_table, _bandwidth_table, _memory_table, _disk_table, _paper_table)
    tables = [make(planned) for make in makers]
    return [*tables, arithmetic_table(planned["flops_per_token"])]
