"""OuterOptions: how sites meet."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from torch import nn

from fomoe_ext.checks import at_least
from fomoe_ext.config.outer import OuterConfig
from fomoe_ext.outer.layout import trained_elements
from fomoe_ext.placement import buckets, wire


@dataclass(frozen=True)
class OuterOptions(OuterConfig):
    """The options of an `OuterSync`; the same at all sites.

    Those of a job's section [outer] (`OuterConfig`, which describes them and holds their defaults),
    and those that a job sets elsewhere. Raises ValueError or TypeError, naming the option, for a
    bad value or a combination that cannot work.

    outer_lr and outer_momentum default to 1 and, with "diloco", 0.2. For the values that DiLoCo was
    published with write `OuterOptions(outer_lr=0.7, outer_momentum=0.9)`.
    """

    SECTION: ClassVar[str] = ""

    local_steps: int | None = None
    """Local steps of a round; required with fragments or overlap."""
    site_mean: Literal["equal", "tokens"] = "equal"
    """How sites are weighted in every mean: all alike, or by the tokens that each has trained on
    in the round (`OuterSync.step(tokens)`), for sites that take different numbers of steps. Deltas
    of experts are weighted by `expert_mean` where that is "tokens"."""
    staged: bool = False
    """Change no parameter before everything has arrived at all sites, so that a meeting in which a
    site is lost can be rolled back and held again (`fomoe_ext.outer.staged`). Takes memory for all
    payloads of a meeting."""
    seed: int = 0
    """Seed of stochastic rounding."""

    @classmethod
    def of_config(
        cls,
        config: OuterConfig,
        *,
        local_steps: int | None = None,
        site_mean: Literal["equal", "tokens"] = "equal",
        staged: bool = False,
        seed: int = 0,
    ) -> OuterOptions:
        """The options of a job: its section [outer], and what its other sections say."""
        shared: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
        return cls(**shared, local_steps=local_steps, site_mean=site_mean, staged=staged, seed=seed)

    def _check(self) -> None:
        super()._check()
        at_least(0, seed=self.seed)
        if self.local_steps is not None:
            at_least(1, local_steps=self.local_steps)
        elif self.staggered:
            raise ValueError(
                "local_steps must be given with fragments > 1 or overlap > 0, got None with "
                f"fragments = {self.fragments} and overlap = {self.overlap!r}"
            )
        wire.check_staggering(
            self.optimizer, self.fragments, self.overlap, self.overlap_alpha, self.local_steps
        )
        if self.staged:
            self.require_whole("staged")
        if self.site_mean == "tokens":
            self.require_whole("site_mean = tokens")

    @property
    def site_numbers(self) -> int:
        """How many numbers a site sends about itself before a meeting, apart from the tokens of
        each expert."""
        return wire.site_numbers(self.site_mean == "tokens", self.clip_delta, self.overlap)

    def with_buckets_for(self, model: nn.Module) -> OuterOptions:
        """These options with a size of buckets: the one given, or the one chosen for the model
        (`fomoe_ext.placement.buckets`), the same at all sites whatever experts they hold."""
        if self.bucket_bytes:
            return self
        codecs = buckets.codecs_of(self.optimizer, self.codec, self.resolved_moment_codecs)
        trained = trained_elements(model)
        chosen = buckets.chosen_bytes(trained, codecs, self.in_flight, self.fragments)
        return replace(self, bucket_bytes=chosen)

    @property
    def alpha(self) -> float:
        """`overlap_alpha`, or 0 without overlap."""
        return self.overlap_alpha if self.overlap else 0.0

    def agreed(self) -> dict[str, Any]:
        """What all sites must have in common, by name; defaults filled in."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "timeout_s"}
        return {
            **values,
            "outer_lr": self.resolved_lr,
            "outer_momentum": self.resolved_momentum,
            "moment_periods": tuple(self.moment_periods),
            "moment_codecs": self.resolved_moment_codecs,
        }
