"""How a job takes it when sites go and come: options, and what they cannot be combined with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fomoe_ext.config.addresses import parse_address

if TYPE_CHECKING:
    from fomoe_ext.config.job import TrainConfig


@dataclass(frozen=True)
class FaultConfig:
    """What happens when a site dies, falls silent or comes late."""

    membership: Literal["static", "torchft"] = "static"
    """static: when a site is lost the job ends, with the last checkpoint intact; torchft: it goes
    on with those left, and takes in those that come (needs the extra `fault`)."""
    lighthouse: str | None = None
    """HOST:PORT ([HOST]:PORT with IPv6) of a running `fomoe lighthouse`, which knows who is there;
    none = the launcher has one of its own."""
    quorum: int = 1
    """Fewest sites with which the job goes on."""
    silent_s: float = 3.0
    """A site of which nothing was heard for so many seconds is taken for dead."""
    grace: float = 4.0
    """A site that is alive but late is waited for so many times as long as a round's local steps
    have taken; then the others go on without it."""
    restarts: int = 0
    """How often the launcher starts a lost site again, each of them."""
    shadow_experts: bool = False
    """Every expert's last agreed state is kept on one more site, so that the death of an expert's
    only holder costs one round of its training at most."""

    def __post_init__(self) -> None:
        for name, least in (("quorum", 1), ("restarts", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"fault.{name} must be an int >= {least}, got {value!r}")
        for name in ("silent_s", "grace"):
            if not getattr(self, name) > 0:
                raise ValueError(f"fault.{name} must be > 0, got {getattr(self, name)!r}")
        if self.lighthouse is not None:
            parse_address(self.lighthouse, "fault.lighthouse")
        if self.membership == "static" and (self.lighthouse or self.restarts):
            raise ValueError("fault.lighthouse and fault.restarts need fault.membership = torchft")
        if self.membership == "static" and self.shadow_experts:
            raise ValueError("fault.shadow_experts needs fault.membership = torchft")

    @property
    def tolerant(self) -> bool:
        """Whether the job outlives a site."""
        return self.membership != "static"


def check_tolerant(config: TrainConfig) -> None:
    """Raises ValueError for what a job that outlives its sites cannot do."""
    sites, outer = config.sites, config.outer
    wrong = {
        "sites.ranks_per_site = 1": sites.ranks_per_site > 1,
        "sites.stale_experts = 0": sites.stale_experts != 0,
        "sites.reshuffle_rounds = 0": sites.reshuffle_rounds > 0,
        "outer.fragments = 1": outer.fragments > 1,
        "outer.overlap = 0": outer.overlap > 0,
        "outer.expert_turns = 1": outer.expert_turns > 1,
        "an outer.optimizer that is not ddp": outer.optimizer == "ddp",
        "run.probe_tokens = 0": config.run.probe_tokens > 0,
    }
    needed = [what for what, violated in wrong.items() if violated]
    if needed:
        raise ValueError(f"fault.membership = torchft needs {', '.join(needed)}")
    if config.fault.quorum > sites.sites:
        raise ValueError(
            f"fault.quorum must be at most sites.sites = {sites.sites}, got {config.fault.quorum}"
        )
