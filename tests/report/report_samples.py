"""Reports and metrics as a job writes them, without a job."""

from __future__ import annotations

import math
from typing import Any

from fomoe_ext.report.tally import Tally


def sample_report(
    num_experts: int = 4, num_layers: int = 2, num_sites: int = 1, equal: bool = True
) -> dict[str, Any]:
    """A report of so many sites, which spent the same seconds and bytes, or all another."""
    memory = {"parameters": 40, "gradients": 40, "anchor": 0, "total": 80}

    def site(number: int) -> dict[str, Any]:
        more = 0 if equal else number
        return {
            **Tally().state_dict(),
            "site": number,
            "startup_s": 1.0,
            "local_s": 9.0 + more,
            "meeting_s": 1.0,
            "exchange_s": 4.0,
            "validation_s": 0.5,
            "wall_s": 12.0 + more,
            "tokens": 900,
            "skipped_share": 0.25,
            "bytes_sent": 1000 + 111_111_111 * more,
            "validation_bytes": 5,
            "planned": {
                "bytes": 1000 + 111_111_111 * more,
                "full_replica_bytes": 2500,
                "ddp_bytes": 40_000,
            },
            "memory": memory,
        }

    load = [[10 * (e + layer) for e in range(num_experts)] for layer in range(num_layers)]
    return {
        "run": {
            "name": "x",
            "sites": num_sites,
            "replication": 1,
            "optimizer": "diloco",
            "codec": "int8",
            "router_scope": "global",
            "vocab_size": 256,
            "rounds": 3,
            "local_steps": 2,
            "tokens": 900 * num_sites,
            "wall_s": 12.0,
            "data": "text",
            "link": "",
            "fragments": 1,
            "overlap": 0,
            "agreements": 3,
        },
        "validation": {"loss": 1.5, "bits_per_byte": 2.16, "tokens": 100, "load": load},
        "first_validation": None,
        "sites": [site(number) for number in range(num_sites)],
        "full_replica_memory": {part: 2 * size for part, size in memory.items()},
        "model_parameters": {"total": 10, "sparse": 9},
        "flops_per_token": {"this run": {"attention": 5.0, "forward": 5.0, "training": 15.0}},
    }


def full_report() -> dict[str, Any]:
    """A report with every table that there is, and every figure in it."""
    report = sample_report(num_experts=64, num_layers=8, num_sites=5, equal=False)
    parts = "parameters gradients inner_state anchor outer_state error_feedback stale_copies total"
    memory = dict.fromkeys(parts.split(), 1_234_567_890)
    report["full_replica_memory"] = memory
    for site in report["sites"]:
        site |= {"memory": memory, "rank_memory": 10**9, "recovery_s": 2.0, "moved_bytes": 123_456}
        site |= {"clipped": 3, "least_factor": 0.123, "left_out": 1, "healed": 1}
        site |= {"checkpoints": 2, "checkpoint_s": 0.5, "checkpoints_failed": 1}
    report["run"] |= {"uneven_steps": True, "clip_delta": 3.0, "expert_turns": 2, "from_round": 1}
    report["run"] |= {"turn_order": "busiest", "ranks_per_site": 2, "link": "1 Mbit/s: delays"}
    report["story"] = [
        {
            **{"round": 12, "step": 48, "members": list(range(40)), "lost": {"3": "it has ended"}},
            **{"joined": [], "reason": "", "meeting": "rolled back", "seconds": 12.3},
            "restored": [{"from_step": 40}, {"from_step": None}],
        }
    ]
    report["routing"] = {
        **{"between_sites": 0.5, "between_rounds": None, "entropy": 1.234},
        **{"load_variation": 0.51, "dead_experts": 3},
    }
    flops = dict.fromkeys(
        ["attention", "router", "experts", "shared_experts", "unembedding"], 1.23e9
    )
    flops |= {"forward": 5e9, "training": 1.5e10}
    report["flops_per_token"] = {"full replica": flops, "this run": flops}
    return report


def sample_records(rounds: int = 50, sites: int = 4) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run whose loss falls; site 1's is not finite in one round."""
    records: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        loss = 1.5 + 4 * math.exp(-number / 8)
        losses = [loss + 0.1 * site for site in range(sites)]
        if number == 2:
            losses[1] = math.nan
        records.append(
            {
                **{"kind": "round", "round": number, "step": 5 * number, "loss": loss},
                **{"losses": losses, "tokens": 5000, "bytes_sent": 1000, "skipped_share": 0.0},
            }
        )
        if number % 10 == 0:
            records.append(
                {"kind": "validation", "round": number, "step": 5 * number, "loss": loss - 0.1}
            )
    return records
