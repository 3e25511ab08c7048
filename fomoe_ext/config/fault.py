"""The section [fault]: what a job does when sites are lost or join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_ext.config.addresses import parse_address


@dataclass(frozen=True)
class FaultConfig:
    """What happens when a site dies, stops responding or joins late."""

    membership: Literal["static", "torchft"] = "static"
    """What happens when a site is lost. static: the job ends, and its last checkpoint remains
    intact; torchft: the job continues with the remaining sites, and sites can join it (needs the
    extra `fault`)."""
    lighthouse: str | None = None
    """Address HOST:PORT ([HOST]:PORT for IPv6) of a running `fomoe lighthouse`, which keeps track
    of the sites that are alive; none = the launcher starts one."""
    quorum: int = 1
    """Smallest number of sites with which the job continues."""
    silent_s: float = 3.0
    """Seconds without a sign of life after which a site is considered dead."""
    grace: float = 4.0
    """How long to wait for a site that is alive but late, as a multiple of the time that the
    round's local steps took; then the other sites go on without it."""
    restarts: int = 0
    """How often the launcher restarts each lost site."""
    shadow_experts: bool = False
    """Keep a copy of every expert, as of the last meeting, at one more site. If the only holder of
    an expert dies, at most one round of its training is lost."""

    def __post_init__(self) -> None:
        for name, least in (("quorum", 1), ("restarts", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"fault.{name} must be an int of at least {least}, got {value!r}")
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
        """Whether the job continues when a site is lost."""
        return self.membership != "static"
