"""The section [outer]: how sites meet, and what of the model travels when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fomoe_ext.config.limits import at_least, in_section, inside
from fomoe_ext.placement import wire
from fomoe_ext.placement.turns import check_turns, counts_tokens


@dataclass(frozen=True)
class OuterConfig:
    """The meeting of the sites at the end of a round.

    DiLoCo's published 0.7 and 0.9 (arXiv 2311.08105) are made for hundreds of rounds: over a few
    dozen the momentum overshoots. So jobs default to 1 and 0.2 with it; name both to have the
    published ones.
    """

    optimizer: Literal["diloco", "fedavg", "local-adamw", "ddp"] = "diloco"
    """diloco: Nesterov on the mean delta; fedavg: mean parameters; local-adamw: mean of parameters
    and both moments; ddp: mean of gradients at every step."""
    outer_lr: float | None = None
    """Learning rate of the outer step; none = 1."""
    outer_momentum: float | None = None
    """Nesterov momentum of the outer step; none = 0.2 for diloco, else 0."""
    codec: Literal[
        "fp32", "bf16", "int8", "int8-128", "int4", "int4-128", "int2", "int2-128", "topk"
    ] = "fp32"
    """How a delta travels: as floats; in 8, 4 or 2 bits with a scale per block of 64 (or 128)
    values; topk: the 64 largest of every 4096 values in 14 bits each."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How int8, int4 and int2 round; stochastic: right on average."""
    error_feedback: bool = True
    """Keep what encoding loses and send it with the next delta."""
    router_mean: Literal["holders", "all"] = "holders"
    """Which sites a router row is averaged over, with router_scope = global."""
    expert_mean: Literal["equal", "tokens"] = "equal"
    """tokens: an expert's deltas weigh as many tokens as each holder routed to it."""
    clip_delta: float = 0.0
    """Scale down deltas longer than so many times the median of all sites', and leave out a site
    whose delta is NaN: against accidents, no defence against a member that wants to do harm; 0 =
    neither, NaN ends the job."""
    rescale: bool = False
    """Multiply mean deltas by the square root of the number of sites they are of (DiPaCo)."""
    moment_periods: tuple[int, ...] = (1, 1)
    """local-adamw: rounds between averages of the first and the second moment (DES-LOC: 3 6)."""
    moment_codecs: tuple[str, ...] = ()
    """local-adamw: codecs of the two moments; none = fp32 with codec fp32, else bf16."""
    stale_codec: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """How copies of absent experts travel (sites.stale_experts); without error feedback."""
    stale_period: int = 1
    """Rounds between two refreshes of these copies."""
    fragments: int = 1
    """The model meets in so many parts, at steps spread over a round."""
    overlap: int = 0
    """Local steps that go on while a part is under way; 0 = sites wait for it."""
    overlap_alpha: float = 0.5
    """With overlap: the share of a parameter that stays the site's own when a part arrives."""
    expert_turns: int = 1
    """Experts take turns: each meets in one of so many meetings, the rest of the model in all."""
    turn_order: Literal["least-trained", "most-trained", "numbered"] = "least-trained"
    """With expert_turns: which experts go first, by the tokens routed to them."""
    on_mismatch: Literal["stop", "heal"] = "stop"
    """When holders differ after a meeting: stop, or take what the majority has."""
    bucket_bytes: int = 1 << 22
    """Size of the buckets in which tensors travel together, bytes of fp32."""
    in_flight: int = 8
    """Buckets under way at once in each direction."""
    timeout_s: float = 300.0
    """Seconds after which a meeting that does not complete is an error."""

    def __post_init__(self) -> None:
        at = "outer."
        at_least(at, 4, bucket_bytes=self.bucket_bytes)
        at_least(at, 1, in_flight=self.in_flight, stale_period=self.stale_period)
        with in_section(at):
            wire.check_moments(self.moment_periods, self.resolved_moment_codecs)
            wire.check_staggering(self.optimizer, self.fragments, self.overlap, self.overlap_alpha)
            wire.check_clip_delta(self.clip_delta)
            check_turns(self.expert_turns, self.turn_order, self.optimizer, self.staggered)
        if not self.timeout_s > 0:
            raise ValueError(f"outer.timeout_s must be > 0, got {self.timeout_s}")
        if self.outer_lr is not None and not self.outer_lr > 0:
            raise ValueError(f"outer.outer_lr must be > 0, got {self.outer_lr}")
        if self.outer_momentum is not None:
            inside(at, 0, 1, outer_momentum=self.outer_momentum)
        if self.expert_mean == "tokens" and self.optimizer == "ddp":
            raise ValueError("outer.expert_mean = tokens needs an optimizer that sends deltas")
        if self.clip_delta:
            self.require_whole("outer.clip_delta")

    @property
    def resolved_moment_codecs(self) -> tuple[str, ...]:
        """`moment_codecs`, or their default."""
        return wire.moment_codecs_of(self.codec, self.moment_codecs)

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

    def require_whole(self, what: str) -> None:
        """Raises ValueError unless all of the model's parameters meet at the end of a round."""
        if self.apart or self.optimizer == "ddp":
            raise ValueError(
                f"{what} needs outer.fragments = 1, outer.overlap = 0, outer.expert_turns = 1 and "
                f"an outer.optimizer that is not ddp, got {self.fragments}, {self.overlap}, "
                f"{self.expert_turns} and {self.optimizer}"
            )

    @property
    def resolved_lr(self) -> float:
        """`outer_lr`, or its default."""
        return 1.0 if self.outer_lr is None else self.outer_lr

    @property
    def resolved_momentum(self) -> float:
        """`outer_momentum`, or its default for the chosen optimizer."""
        default = 0.2 if self.optimizer == "diloco" else 0.0
        return default if self.outer_momentum is None else self.outer_momentum
