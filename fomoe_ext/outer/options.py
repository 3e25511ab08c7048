"""How sites meet: the options of `OuterSync`, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from fomoe_ext.checks import a_bool, at_least, one_of
from fomoe_ext.outer.codec import Codec, get_codec
from fomoe_ext.outer.optimizer import OuterRule
from fomoe_ext.placement import stale, wire
from fomoe_ext.placement.turns import check_turns, counts_tokens


@dataclass(frozen=True)
class OuterOptions:
    """The keywords of `OuterSync`, the same on all sites; ValueError or TypeError for a bad one."""

    optimizer: Literal["diloco", "fedavg", "local-adamw", "ddp"] = "diloco"
    """See `fomoe_ext.outer.optimizer`."""
    outer_lr: float | None = None
    """None = 0.7 for diloco, 1 for the others."""
    outer_momentum: float | None = None
    """None = 0.9 for diloco, 0 for the others."""
    codec: str | Codec = "fp32"
    """How deltas (with "ddp" gradients) travel: one of `wire.CODECS`."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How int8, int4 and int2 round; stochastic: up or down at random, right on average."""
    error_feedback: bool = True
    """Keep what encoding loses and send it with the next delta, on both ends of the all-reduce."""
    router_mean: Literal["holders", "all"] = "holders"
    """Over which sites a router row is averaged, with router_scope "global"."""
    expert_mean: Literal["equal", "tokens"] = "equal"
    """tokens: an expert's deltas weigh as many tokens as each holder routed to it, in all forward
    passes that lead to its optimizer steps: in training mode, with gradients."""
    site_mean: Literal["equal", "tokens"] = "equal"
    """tokens: a site's values, dense and experts', parameters and moments, weigh as many tokens as
    it has trained on in the round (`OuterSync.step(tokens)`); for sites that take fewer steps than
    others. Where `expert_mean` is "tokens" experts' deltas go by that."""
    clip_delta: float = 0.0
    """Guards a meeting against accidents at a site, not against a member that wants to do harm:
    a site's delta whose norm is more than so many times the median of all sites' is scaled down to
    that (moments are not), and a site that has NaN is left out of all averages, takes what the
    others have agreed on, and starts the inner moments that are not finite from zero. 0 = no
    clipping, and NaN at one site is an error for all; else at least 1."""
    rescale: bool = False
    """Multiply a mean delta by the square root of the number of sites it is of (DiPaCo)."""
    moment_periods: Sequence[int] = (1, 1)
    """local-adamw: rounds between two averages of the first and of the second moment."""
    moment_codecs: Sequence[str] | None = None
    """local-adamw: codecs of the two moments, without error feedback. None = fp32 with codec fp32,
    else bf16. The second moment must not be rounded to zero: fp32 or bf16."""
    fragments: int = 1
    """The model meets in so many parts, at steps spread evenly over a round."""
    expert_turns: int = 1
    """Meetings of which an expert has one: a part of each owner group's experts takes its turn in
    each (`fomoe_ext.placement.turns`). With several turns parameters of experts go on without
    their anchor, which is then the model of all sites (`OuterSync.copy_anchor_to_model`)."""
    turn_order: Literal["least-trained", "most-trained", "numbered"] = "least-trained"
    """With expert_turns: which experts go first, by tokens routed to them."""
    overlap: int = 0
    """Local steps that go on while a fragment is under way; 0 = the site waits for it."""
    overlap_alpha: float = 0.5
    """With overlap: the share of a parameter that stays the site's own when a fragment arrives."""
    local_steps: int | None = None
    """Local steps of a round; needed for fragments and overlap."""
    bucket_bytes: int = 1 << 22
    """fp32 bytes that travel at once."""
    in_flight: int = wire.IN_FLIGHT
    """Buckets under way at once in each direction."""
    on_mismatch: Literal["stop", "heal"] = "stop"
    """When holders differ after a meeting: stop, or take what the majority has."""
    stale_codec: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """How copies of absent experts travel (`MoELayer`'s stale_experts); rounds to nearest."""
    stale_period: int = 1
    """Rounds between two refreshes of these copies."""
    staged: bool = False
    """Apply nothing before all of it has arrived everywhere: a meeting that breaks off because a
    site is lost can be held again (`fomoe_ext.outer.staged`). Takes the memory of all payloads."""
    seed: int = 0
    """Of stochastic rounding."""

    def __post_init__(self) -> None:
        OuterRule.make(self.optimizer, self.outer_lr, self.outer_momentum)
        get_codec(self.codec, self.rounding)
        one_of(("holders", "all"), router_mean=self.router_mean)
        one_of(("equal", "tokens"), expert_mean=self.expert_mean)
        one_of(("equal", "tokens"), site_mean=self.site_mean)
        wire.check_clip_delta(self.clip_delta)
        one_of(("stop", "heal"), on_mismatch=self.on_mismatch)
        one_of(stale.CODECS, stale_codec=self.stale_codec)
        at_least(1, stale_period=self.stale_period)
        a_bool(error_feedback=self.error_feedback, rescale=self.rescale, staged=self.staged)
        at_least(0, seed=self.seed)
        at_least(1, in_flight=self.in_flight)
        wire.bucket_elements(self.bucket_bytes)
        wire.check_moments(self.moment_periods, self.codecs_of_moments)
        if self.local_steps is not None:
            at_least(1, local_steps=self.local_steps)
        wire.check_staggering(
            self.optimizer, self.fragments, self.overlap, self.overlap_alpha, self.local_steps
        )
        check_turns(self.expert_turns, self.turn_order, self.optimizer, self.staggered)
        if self.staggered and self.local_steps is None:
            raise ValueError("fragments and overlap need local_steps")
        whole = not self.apart and self.optimizer != "ddp"
        if not whole and (self.staged or self.site_mean == "tokens" or self.clip_delta):
            raise ValueError(
                "staged, site_mean = tokens and clip_delta need fragments = 1, overlap = 0, "
                "expert_turns = 1 and an optimizer but ddp"
            )
        if self.expert_mean == "tokens" and self.optimizer == "ddp":
            raise ValueError("expert_mean = tokens is for deltas: optimizer must not be ddp")

    @property
    def staggered(self) -> bool:
        """Whether meetings are spread over a round, or go on during its steps."""
        return wire.is_staggered(self.fragments, self.overlap)

    @property
    def apart(self) -> bool:
        """Whether sites' parameters differ after a meeting, and the anchor is what they share."""
        return self.staggered or self.expert_turns > 1

    @property
    def counts_tokens(self) -> bool:
        """Whether sites tell each other how many tokens they have routed to each expert."""
        return counts_tokens(self.expert_mean, self.expert_turns, self.turn_order)

    @property
    def site_numbers(self) -> int:
        """How many numbers a site tells of itself before a meeting, experts' counts aside."""
        return wire.site_numbers(self.site_mean == "tokens", self.clip_delta)

    @property
    def alpha(self) -> float:
        """`overlap_alpha`, or 0 without overlap."""
        return self.overlap_alpha if self.overlap else 0.0

    @property
    def codecs_of_moments(self) -> tuple[str, ...]:
        """`moment_codecs`, or their default."""
        return wire.moment_codecs_of(get_codec(self.codec).name, self.moment_codecs)

    def agreed(self) -> dict[str, Any]:
        """What all sites must have in common, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **values,
            "codec": get_codec(self.codec).name,
            "moment_periods": tuple(self.moment_periods),
            "moment_codecs": self.codecs_of_moments,
        }
