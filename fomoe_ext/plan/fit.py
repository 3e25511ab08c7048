"""Which replication and codec fit into a memory and cost the least time per round. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan.jobs import (
    JobCost,
    job_cost,
    possible_replications,
    with_codec,
    with_replication,
)
from fomoe_ext.report.tables import ReportTable
from fomoe_ext.report.units import human_bytes

FIT_CODECS = ("fp32", "bf16", "int8", "int4", "int2")
"""Codecs that a fit may choose, and the job's own: topk needs thousands of rounds, so it is chosen
only for a job that asks for it."""


class Candidate(NamedTuple):
    """A job with another replication and codec, and whether its fullest rank has room for it."""

    config: TrainConfig
    cost: JobCost
    fits: bool

    @property
    def replication(self) -> int:
        """Sites that hold each expert."""
        return self.config.sites.replication

    @property
    def codec(self) -> str:
        """How deltas travel."""
        return self.config.outer.codec

    def as_dict(self) -> dict[str, Any]:
        """Plain data; memory in bytes, of a meeting too, without activations."""
        return {
            "replication": self.replication,
            "codec": self.codec,
            "memory": self.cost.peak_memory,
            "bytes_sent": self.cost.round.bytes_sent,
            "seconds": self.cost.round.seconds,
            "utilization": self.cost.round.utilization,
            "fits": self.fits,
        }


def fit_candidates(
    config: TrainConfig, memory: float, link: Link, flops_per_s: float
) -> list[Candidate]:
    """Every possible replication with every codec, the highest replication first."""
    own = config.outer.codec
    codecs = FIT_CODECS if own in FIT_CODECS else (*FIT_CODECS, own)
    result = []
    for replication in reversed(possible_replications(config)):
        for codec in codecs:
            job = with_replication(config, replication)
            job = job if codec == own else with_codec(job, codec)
            cost = job_cost(job, link, flops_per_s)
            result.append(Candidate(job, cost, cost.peak_memory <= memory))
    return result


def cheapest(candidates: Sequence[Candidate]) -> Candidate | None:
    """Of those that fit the one with least seconds per round; of equals the highest replication,
    then the codec with most bits. None where nothing fits."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    return min(fitting, key=lambda c: (c.cost.round.seconds, -c.replication), default=None)


def fit_dict(candidates: Sequence[Candidate], memory: float) -> dict[str, Any]:
    """A fit as plain data: the limit, the candidates, the choice and the smallest memory of all."""
    choice = cheapest(candidates)
    return {
        "memory": memory,
        "candidates": [candidate.as_dict() for candidate in candidates],
        "choice": None if choice is None else choice.as_dict(),
        "smallest_memory": min(candidate.cost.peak_memory for candidate in candidates),
    }


def fit_table(candidates: Sequence[Candidate], memory: float) -> ReportTable:
    """The candidates, the choice marked."""
    choice = cheapest(candidates)
    ranks = candidates[0].config.sites.ranks_per_site
    rows = []
    for candidate in candidates:
        cost = candidate.cost
        verdict = "yes" if candidate.fits else "no"
        rows.append(
            (
                f"{candidate.replication}",
                candidate.codec,
                human_bytes(cost.peak_memory),
                "chosen" if candidate is choice else verdict,
                human_bytes(cost.round.bytes_sent),
                f"{cost.round.seconds:.3g} s",
                f"{cost.round.utilization:.1%}",
            )
        )
    of_what = "rank, at most" if ranks > 1 else "site"
    return ReportTable(
        f"What fits into {human_bytes(memory)}",
        ("replication", "codec", f"memory per {of_what}", "fits", "sent", "round", "utilization"),
        tuple(rows),
        "Chosen: least time per round of what fits. Activations are not counted. Less replication "
        "skips more slots or chooses among fewer experts: that saves time, and costs quality.",
    )


def no_fit(candidates: Sequence[Candidate], memory: float) -> str:
    """Says that nothing fits, and what comes nearest."""
    best = min(candidates, key=lambda candidate: candidate.cost.peak_memory)
    return (
        f"nothing fits into {human_bytes(memory)}: the least is "
        f"{human_bytes(best.cost.peak_memory)}, with replication {best.replication} and codec "
        f"{best.codec}"
    )
