"""The report of a job, made of what all its sites have counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fomoe_ext.config.job import TrainConfig, count_parameters
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.plan import memory as plan_memory
from fomoe_ext.plan import traffic as plan
from fomoe_ext.report.tally import Tally


def site_part(
    site: int, tally: Tally, memory: Mapping[str, int], config: TrainConfig, rounds: int
) -> dict[str, Any]:
    """One site's part of the report. `memory`: counted bytes by part of `SiteMemory`."""
    return {
        "site": site,
        **tally.state_dict(),
        "skipped_share": tally.skipped_share,
        "planned": {
            "bytes": tally.planned_bytes,
            "full_replica_bytes": plan.full_replica_bytes(config, rounds, tally.from_round),
            "ddp_bytes": plan.ddp_bytes(config, tally.steps - tally.from_step),
        },
        "memory": {**memory, "total": sum(memory.values())},
    }


def build_report(
    config: TrainConfig,
    placement: Placement,
    sites: Sequence[Mapping[str, Any]],
    validation: Mapping[str, Any],
    *,
    rounds: int,
    data: str,
    model_hash: str,
    link: str,
    routing: Mapping[str, Any] | None = None,
    story: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The report (`fomoe_ext.report`) of the parts of all sites and the last validation.

    `validation`: loss, bits_per_byte, tokens, load [L][E]. `model_hash`: of all parameters. `link`:
    what meetings went over, in words. `routing`: `routing_probe.figures` of the last meeting.
    `story`: what happened to the sites, one by one.
    """
    model, counts = config.model, count_parameters(config.model)
    share = placement.replication / placement.num_sites
    flops = {
        "full replica": plan_cost.flops_per_token(model),
        "this run": plan_cost.flops_per_token(model, share, plan.stale_share(config)),
    }
    full = plan_memory.job_memory(config, None)
    return {
        "run": {
            "name": config.run.run_dir.name if config.run.run_dir else "run",
            "sites": placement.num_sites,
            "ranks_per_site": config.sites.ranks_per_site,
            "from_round": min(site["from_round"] for site in sites),
            "replication": placement.replication,
            "optimizer": config.outer.optimizer,
            "codec": config.outer.codec,
            "router_scope": model.router_scope,
            "rounds": rounds,
            "local_steps": config.run.local_steps,
            "tokens": sum(site["tokens"] for site in sites),
            "wall_s": max(site["wall_s"] for site in sites),
            "data": data,
            "model_hash": model_hash,
            "link": link,
            "agreements": min(site["agreements"] for site in sites),
            "fragments": config.outer.fragments,
            "overlap": config.outer.overlap,
            "expert_turns": config.outer.expert_turns,
            "turn_order": config.outer.turn_order,
            "uneven_steps": config.inner.uneven_steps,
            "clip_delta": config.outer.clip_delta,
        },
        "validation": dict(validation),
        "first_validation": sites[0]["first_validation"],
        "routing": None if routing is None else dict(routing),
        "story": [dict(event) for event in story],
        "sites": [dict(site) for site in sites],
        "full_replica_memory": {**full._asdict(), "total": full.total},
        "model_parameters": {"total": counts.total, "sparse": counts.sparse},
        "flops_per_token": {
            kind: {**row._asdict(), "forward": row.forward, "training": row.training}
            for kind, row in flops.items()
        },
    }
