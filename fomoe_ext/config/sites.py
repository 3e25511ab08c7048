"""The section [sites]: sites and their ranks, who holds what, and the link between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fomoe_ext.config.limits import at_least, inside
from fomoe_ext.config.links import parse_link


@dataclass(frozen=True)
class SitesConfig:
    """How many sites there are and which experts each one holds."""

    sites: int = 4
    """Number of sites."""
    replication: int = 2
    """Number of sites that hold each expert, 1..sites."""
    placement: Literal["cyclic", "random", "together", "apart"] = "cyclic"
    """cyclic: fixed and evenly spread; random: drawn from the seed, anew at every reshuffle;
    together, apart: experts that tokens choose together (placement_by) on the same sites or not."""
    placement_by: Path | None = None
    """Run folder, or JSON table [layer][expert][expert], with how often a token chose both of two
    experts; for placement = together or apart."""
    placement_file: Path | None = None
    """JSON table [layer][expert] -> list of sites; overrides `placement`."""
    ranks_per_site: int = 1
    """Processes of each site: they share its batch, its experts and its dense parameters (FSDP)."""
    replicas: int = 1
    """Times that each site holds its experts: ranks_per_site / replicas ranks share a copy."""
    spread_by: Path | None = None
    """Run folder, or JSON table [layer][expert], with the load of experts: keeps the hot ones of a
    site on different ranks; none = ascending by id."""
    stale_experts: int = 0
    """Absent experts per layer of which each site computes a frozen copy, refreshed in meetings;
    -1 = all of them, so that nothing is skipped."""
    stale_by: Path | None = None
    """Run folder, or JSON table [layer][expert], with the load of experts: a site copies those of
    its absent experts that are chosen most; none = all are copied about as often."""
    reshuffle_rounds: int = 0
    """Draw a new random placement every so many rounds; 0 = never."""
    reshuffle_moments: Literal["reset", "carry"] = "reset"
    """AdamW moments of experts that move: start from zero, or travel along (twice the elements)."""
    reshuffle_warmup: int | None = None
    """Steps over which the learning rate of experts new to a site rises to its full value; none =
    8, or 0 where their moments travel along."""
    threads: int = 0
    """Threads per site; 0 = this machine's cores shared among its sites."""
    link: str | None = None
    """A slow link on this machine, such as 200mbit,50ms (what each site can send, and how long it
    takes to arrive): meetings take what they would on it; none = as fast as this machine is."""

    def __post_init__(self) -> None:
        at = "sites."
        at_least(at, 1, sites=self.sites)
        at_least(at, 0, reshuffle_rounds=self.reshuffle_rounds, threads=self.threads)
        at_least(at, 0, reshuffle_warmup=self.reshuffle_warmup)
        at_least(at, 1, ranks_per_site=self.ranks_per_site, replicas=self.replicas)
        if self.ranks_per_site % self.replicas:
            raise ValueError(
                f"sites.replicas must divide sites.ranks_per_site = {self.ranks_per_site}, got "
                f"{self.replicas}"
            )
        if self.reshuffle_rounds and self.ranks_per_site > 1:
            raise ValueError("sites.reshuffle_rounds needs sites.ranks_per_site = 1")
        if self.spread_by is not None and self.ranks_per_site == self.replicas:
            raise ValueError("sites.spread_by needs several ranks that share a site's experts")
        inside(at, 1, self.sites, replication=self.replication)
        at_least(at, -1, stale_experts=self.stale_experts)
        if self.stale_experts and (self.reshuffle_rounds or self.ranks_per_site > 1):
            raise ValueError(
                "sites.stale_experts needs sites.reshuffle_rounds = 0 and sites.ranks_per_site = "
                f"1, got {self.reshuffle_rounds} and {self.ranks_per_site}"
            )
        if self.stale_by is not None and self.stale_experts < 1:
            raise ValueError(
                f"sites.stale_by needs sites.stale_experts of 1 or more, got {self.stale_experts}"
            )
        if (self.placement in ("together", "apart")) != (self.placement_by is not None):
            raise ValueError(
                "sites.placement = together or apart and sites.placement_by need each other, got "
                f"{self.placement} and {self.placement_by}"
            )
        if self.link is not None:
            parse_link(self.link)
        if self.reshuffle_rounds and (self.placement != "random" or self.placement_file):
            raise ValueError("sites.reshuffle_rounds needs sites.placement = random and no table")

    @property
    def resolved_warmup(self) -> int:
        """`reshuffle_warmup`, or its default."""
        default = 0 if self.reshuffle_moments == "carry" else 8
        return default if self.reshuffle_warmup is None else self.reshuffle_warmup
