"""The section [sites]: sites and their ranks, the placement of experts, and the link."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fomoe_ext.config.limits import at_least, inside
from fomoe_ext.config.links import parse_link


@dataclass(frozen=True)
class SitesConfig:
    """The sites, and which experts each of them holds."""

    sites: int = 4
    """Number of sites."""
    replication: int = 2
    """Number of sites that hold each expert, 1 to sites."""
    placement: Literal["cyclic", "random", "together", "apart"] = "cyclic"
    """Which sites hold which expert. cyclic: evenly spread, fixed; random: drawn from the seed,
    again at every reshuffle; together, apart: experts that are often chosen for the same token
    (placement_by) on the same sites, or on different ones."""
    placement_by: Path | None = None
    """For placement = together or apart: run folder, or JSON table [layer][expert][expert], that
    says how often each pair of experts was chosen for the same token."""
    placement_file: Path | None = None
    """JSON table [layer][expert] of lists of sites; overrides placement."""
    ranks_per_site: int = 1
    """Processes per site. They share the site's batch, its experts and its dense parameters
    (FSDP)."""
    replicas: int = 1
    """Number of copies of its experts that a site of several ranks holds; ranks_per_site / replicas
    ranks share one copy."""
    spread_by: Path | None = None
    """Run folder, or JSON table [layer][expert], with the load of experts: puts a site's most
    loaded experts on different ranks; none = in order of their ids."""
    stale_experts: int = 0
    """Number of absent experts per layer of which each site keeps a frozen copy and computes with
    it. Meetings refresh the copies. -1 = all absent experts, so that no expert is skipped."""
    stale_by: Path | None = None
    """Run folder, or JSON table [layer][expert], with the load of experts: each site copies its
    most chosen absent experts; none = every expert is copied about equally often."""
    reshuffle_rounds: int = 0
    """Draw a new random placement every so many rounds; 0 = never."""
    reshuffle_moments: Literal["reset", "carry"] = "reset"
    """What happens to the AdamW moments of experts that move to another site. reset: they start
    from zero; carry: they are sent along, two values per parameter."""
    reshuffle_warmup: int | None = None
    """Steps over which the learning rate of experts that moved rises to its full value; none = 8,
    or 0 if their moments are sent along."""
    threads: int = 0
    """CPU threads per site; 0 = an equal share of this machine's cores."""
    link: str | None = None
    """Emulate a slow link between sites on this machine, such as 200mbit,50ms (bandwidth of each
    site, one-way latency). Meetings then take as long as over such a link; none = no limit."""

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
            raise ValueError(
                f"sites.reshuffle_rounds needs sites.ranks_per_site = 1, got {self.ranks_per_site}"
            )
        if self.spread_by is not None and self.ranks_per_site == self.replicas:
            raise ValueError(
                "sites.spread_by needs sites.ranks_per_site > sites.replicas, got "
                f"{self.ranks_per_site} and {self.replicas}"
            )
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
            raise ValueError(
                "sites.reshuffle_rounds needs sites.placement = random and no "
                f"sites.placement_file, got {self.placement} and {self.placement_file}"
            )

    @property
    def resolved_warmup(self) -> int:
        """`reshuffle_warmup`, or its default."""
        default = 0 if self.reshuffle_moments == "carry" else 8
        return default if self.reshuffle_warmup is None else self.reshuffle_warmup
