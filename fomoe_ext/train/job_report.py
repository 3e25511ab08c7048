"""The report of a job, from the counts of all its sites."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fomoe_ext.config.model import count_parameters
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.launch.world import with_others
from fomoe_ext.layer.mesh import local_tensor
from fomoe_ext.model.evaluate import Validation
from fomoe_ext.plan import cost as plan_cost
from fomoe_ext.plan import memory as plan_memory
from fomoe_ext.plan import traffic as plan
from fomoe_ext.report.tally import Tally
from fomoe_ext.train.state import SiteState


def job_report(site: SiteState, validation: Validation) -> dict[str, Any]:
    """The report, equal on all sites; a collective."""
    site.count_wall()
    site.tally.bytes_sent = site.bytes_sent
    site.tally.agreements = site.sync.agreements
    shown = {
        "loss": validation.loss,
        "bits_per_byte": validation.bits_per_byte,
        "tokens": validation.tokens,
        "load": validation.load.tolist(),
    }
    if validation.coactivation is not None:
        shown["coactivation"] = validation.coactivation.tolist()
    with with_others("the report", site.world.site):
        own = site.sync.ranks.gather((site.tally.state_dict(), memory_of(site)))
        tally = Tally.of_ranks([Tally.from_state(state) for state, _ in own])
        memory = {part: sum(m[part] for _, m in own) for part in own[0][1]}
        mine = _of_one(site, tally, memory)
        mine["rank_memory"] = max(sum(m.values()) for _, m in own)
        parts = gather_objects(mine, site.world.processes)[:: site.world.ranks]
        digest = model_hash(site)
    return _of_all(site, parts, shown, digest)


def memory_of(site: SiteState) -> dict[str, int]:
    """Bytes of this process's tensors, by the fields of `plan.memory.SiteMemory`."""
    states = site.optimizer.state.values()
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    anchor, outer_state, error_feedback = site.sync.state_bytes()
    return {
        "parameters": sum(local_tensor(p).nbytes for p in site.model.parameters()),
        "gradients": site.tally.gradient_bytes,
        "inner_state": sum(local_tensor(t).nbytes for t in tensors if t.dim()),
        "anchor": anchor,
        "outer_state": outer_state,
        "error_feedback": error_feedback,
        "stale_copies": 0 if site.sync.copies is None else site.sync.copies.nbytes,
        "shadow_copies": site.shadows.nbytes,
    }


def model_hash(site: SiteState) -> str:
    """SHA-256 over the parameters' bits of the whole model; a collective."""
    everyone = gather_objects(site.sync.hashes(), site.world.processes)
    digests = {name: digest for hashes in everyone for name, digest in hashes.items()}
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _of_one(site: SiteState, tally: Tally, memory: Mapping[str, int]) -> dict[str, Any]:
    """A site's part of the report. `memory`: counted bytes by part of `SiteMemory`."""
    config = site.config
    return {
        "site": site.world.site,
        **tally.state_dict(),
        "skipped_share": tally.skipped_share,
        "planned": {
            "bytes": tally.planned_bytes,
            "full_replica_bytes": plan.full_replica_bytes(config, site.round, tally.from_round),
            "ddp_bytes": plan.ddp_bytes(config, tally.steps - tally.from_step),
        },
        "memory": {**memory, "total": sum(memory.values())},
    }


def _of_all(
    site: SiteState,
    parts: Sequence[Mapping[str, Any]],
    validation: Mapping[str, Any],
    digest: str,
) -> dict[str, Any]:
    """The report (`fomoe_ext.report`), from the parts of all sites and the last validation.

    `validation`: loss, bits_per_byte, tokens, load [L][E]. `digest`: SHA-256 of all parameters.
    """
    config, placement = site.config, site.placement
    model, counts = config.model, count_parameters(config.model)
    share = placement.replication / placement.num_sites
    flops = {
        "full replica": plan_cost.flops_per_token(model),
        "this run": plan_cost.flops_per_token(model, share, plan.stale_share(config)),
    }
    full = plan_memory.job_memory(config, None)
    return {
        "run": _run(site, parts, digest),
        "validation": dict(validation),
        "first_validation": parts[0]["first_validation"],
        "routing": None if site.routing is None else dict(site.routing),
        "story": [dict(event) for event in site.story],
        "sites": [dict(part) for part in parts],
        "full_replica_memory": {**full._asdict(), "total": full.total},
        "model_parameters": {"total": counts.total, "sparse": counts.sparse},
        "flops_per_token": {
            kind: {**row._asdict(), "forward": row.forward, "training": row.training}
            for kind, row in flops.items()
        },
    }


def _run(site: SiteState, parts: Sequence[Mapping[str, Any]], digest: str) -> dict[str, Any]:
    """The report's section about the job as a whole."""
    config = site.config
    return {
        "name": config.run.run_dir.name if config.run.run_dir else "run",
        "sites": site.placement.num_sites,
        "ranks_per_site": config.sites.ranks_per_site,
        "from_round": min(part["from_round"] for part in parts),
        "replication": site.placement.replication,
        "optimizer": config.outer.optimizer,
        "codec": config.outer.codec,
        "router_scope": config.model.router_scope,
        "vocab_size": config.model.vocab_size,
        "rounds": site.round,
        "local_steps": config.run.local_steps,
        "tokens": sum(part["tokens"] for part in parts),
        "wall_s": max(part["wall_s"] for part in parts),
        "data": site.data.description,
        "model_hash": digest,
        "link": site.link,
        "agreements": min(part["agreements"] for part in parts),
        "fragments": config.outer.fragments,
        "overlap": site.sync.overlap.steps if config.outer.overlap else 0,
        "overlap_reason": site.sync.overlap.reason,
        "expert_turns": config.outer.expert_turns,
        "turn_order": config.outer.turn_order,
        "uneven_steps": config.inner.uneven_steps,
        "clip_delta": config.outer.clip_delta,
    }
