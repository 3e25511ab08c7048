"""The section [fault]: how a job takes it when sites go and come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_ext.config.addresses import parse_address


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
