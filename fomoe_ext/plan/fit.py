"""The replication and codec that fit into a memory and take the least time per round. No torch."""

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
"""Codecs that a fit may choose, in addition to the job's own. topk is missing because it needs
thousands of rounds."""


class Candidate(NamedTuple):
    """A job with another replication and codec. fits: whether its fullest rank has the memory."""

    config: TrainConfig
    cost: JobCost
    fits: bool

    @property
    def replication(self) -> int:
        """Sites that hold each expert."""
        return self.config.sites.replication

    @property
    def codec(self) -> str:
        """Codec of the deltas."""
        return self.config.outer.codec

    def as_dict(self) -> dict[str, Any]:
        """Plain data. memory: bytes at the fullest rank during a meeting, without activations."""
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
    """Every possible replication with every codec, highest replication first."""
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
    """The candidate that fits and takes the least time per round. Ties go to the highest
    replication, then to the codec with the most bits. None if nothing fits."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    return min(fitting, key=lambda c: (c.cost.round.seconds, -c.replication), default=None)


def fit_dict(candidates: Sequence[Candidate], memory: float) -> dict[str, Any]:
    """Plain data: the limit, all candidates, the chosen one, and the smallest memory of any."""
    choice = cheapest(candidates)
    return {
        "memory": memory,
        "candidates": [candidate.as_dict() for candidate in candidates],
        "choice": None if choice is None else choice.as_dict(),
        "smallest_memory": min(candidate.cost.peak_memory for candidate in candidates),
    }


def fit_table(candidates: Sequence[Candidate], memory: float) -> ReportTable:
    """A table of the candidates, in which the chosen one is marked."""
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
        "Chosen: the least time per round of those that fit. Activations are not counted. With "
        "less replication more slots are skipped, or tokens choose among fewer experts: that saves "
        "time and costs quality.",
    )


def no_fit(candidates: Sequence[Candidate], memory: float) -> str:
    """The message that nothing fits, with the candidate that needs the least memory."""
    best = min(candidates, key=lambda candidate: candidate.cost.peak_memory)
    return (
        f"nothing fits into {human_bytes(memory)}: the least is "
        f"{human_bytes(best.cost.peak_memory)}, with replication {best.replication} and codec "
        f"{best.codec}"
    )
