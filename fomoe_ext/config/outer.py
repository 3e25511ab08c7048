"""The section [outer]: how sites meet, and what of the model travels when.

`OuterConfig` declares every option once, for jobs and for the library:
`fomoe_ext.outer.options.OuterOptions` extends it with what a job sets in its other sections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fomoe_ext.checks import at_least, finite
from fomoe_ext.config.limits import check_choices, in_section
from fomoe_ext.placement import buckets, wire
from fomoe_ext.placement.turns import check_turns, counts_tokens


@dataclass(frozen=True)
class OuterConfig:
    """How the sites of a job meet at the end of a round.

    The published values of DiLoCo, outer_lr = 0.7 and outer_momentum = 0.9 (arXiv 2311.08105), were
    chosen for runs of hundreds of rounds. Over a few dozen rounds that momentum overshoots, so the
    defaults are 1 and 0.2. Set both options to get the published values.
    """

    SECTION: ClassVar[str] = "outer."
    """What error messages put before the name of an option."""

    optimizer: Literal["diloco", "fedavg", "local-adamw", "ddp"] = "diloco"
    """What sites average. diloco: their deltas, which a Nesterov step then applies; fedavg: their
    parameters; local-adamw: their parameters and both AdamW moments; ddp: their gradients, at every
    step. (A delta is how far a site's local steps have moved a parameter.)"""
    outer_lr: float | None = None
    """Learning rate of the outer step; none = 1. DiLoCo's published value is 0.7."""
    outer_momentum: float | None = None
    """Nesterov momentum of the outer step; none = 0.2 for diloco, else 0. DiLoCo's published value
    is 0.9."""
    codec: Literal[
        "fp32", "bf16", "int8", "int8-128", "int4", "int4-128", "int2", "int2-128", "topk"
    ] = "fp32"
    """How deltas (for ddp: gradients) are encoded for the link. fp32, bf16: as floats; int8, int4,
    int2: as integers with one scale per block of 64 values, or of 128 with "-128"; topk: the 64
    largest of every 4096 values, in 14 bits each."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How the codecs int8, int4 and int2 round: to the nearest code, or stochastic: up or down at
    random, so that the expected value is exact."""
    error_feedback: bool = True
    """Keep the error of a lossy codec and add it to the next delta."""
    router_mean: Literal["holders", "all"] = "holders"
    """Whose router rows are averaged, with router_scope = global: those of the sites that hold the
    row's expert, or those of all sites."""
    expert_mean: Literal["equal", "tokens"] = "equal"
    """How the sites that hold an expert are weighted in its mean: all alike, or by the tokens that
    each routed to the expert in its local steps."""
    clip_delta: float = 0.0
    """Protect a meeting from a site gone wrong by accident; no protection from a malicious site. A
    site's delta longer than this many times the median of all sites is scaled down to that length,
    and a site whose delta is NaN is left out. At least 1; 0 = off: a NaN at one site ends the
    job."""
    rescale: bool = False
    """Multiply each mean delta by the square root of the number of sites in the mean (DiPaCo)."""
    moment_periods: tuple[int, ...] = (1, 1)
    """For local-adamw: average the first and the second AdamW moment every so many rounds
    (DES-LOC: 3 6)."""
    moment_codecs: tuple[str, ...] = ()
    """For local-adamw: codecs of the first and the second AdamW moment, without error feedback; the
    second must be fp32 or bf16. Empty = fp32 if codec is fp32, else bf16."""
    stale_codec: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """Codec of the frozen copies of absent experts (stale_experts); rounds to nearest, without
    error feedback."""
    stale_period: int = 1
    """Refresh the frozen copies of absent experts every so many rounds."""
    fragments: int = 1
    """Split the model into this many parts, each averaged at its own step of a round, which spreads
    the traffic over the round."""
    overlap: int | Literal["auto"] = 0
    """Number of local steps that a site takes while a part of the model is on its way; 0 = the site
    waits until it has arrived; auto = as many as the exchange takes, by the measured times of all
    sites, at most local_steps - 1. With auto two runs do not end with the same bits."""
    overlap_alpha: float = 0.5
    """With overlap: the share of the site's own value in each parameter when a part arrives; the
    rest is the averaged value. In [0, 1)."""
    expert_turns: int = 1
    """Average each expert only once in so many meetings, experts taking turns; the rest of the
    model is averaged in every meeting."""
    turn_order: Literal["least-trained", "most-trained", "numbered"] = "least-trained"
    """With expert_turns: which experts go first: those to which the fewest or the most tokens were
    routed, or by number."""
    on_mismatch: Literal["stop", "heal"] = "stop"
    """What to do when sites that hold the same expert differ after a meeting: stop with an error,
    or heal: take the values that most of them have."""
    bucket_bytes: int = 0
    """Size of a bucket, the unit in which tensors are sent, in bytes of fp32. 0 = chosen by the
    size of the model: 4 MiB up to 134 million parameters, more for larger models, so that few
    latencies of the link are waited for (`fomoe plan` tells the size)."""
    in_flight: int = 8
    """Number of buckets on their way at once in each direction."""
    timeout_s: float = 300.0
    """Seconds after which an exchange that has not completed is an error."""

    def __post_init__(self) -> None:
        with in_section(self.SECTION):
            self._check()

    def _check(self) -> None:
        """Raises ValueError or TypeError, which begins with the name of the option."""
        check_choices(self)
        for name in ("outer_lr", "outer_momentum"):
            if getattr(self, name) is not None:
                finite(0.0, **{name: getattr(self, name)})
        if self.outer_lr == 0:
            raise ValueError(f"outer_lr must be > 0, got {self.outer_lr}")
        if self.resolved_momentum >= 1:
            raise ValueError(f"outer_momentum must be in [0, 1), got {self.outer_momentum}")
        at_least(1, in_flight=self.in_flight, stale_period=self.stale_period)
        buckets.check_bucket_bytes(self.bucket_bytes)
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0, got {self.timeout_s}")
        wire.check_moments(self.moment_periods, self.resolved_moment_codecs)
        wire.check_staggering(self.optimizer, self.fragments, self.overlap, self.overlap_alpha)
        check_turns(self.expert_turns, self.turn_order, self.optimizer, self.staggered)
        wire.check_clip_delta(self.clip_delta)
        if self.clip_delta:
            self.require_whole("clip_delta")
        if self.expert_mean == "tokens" and self.optimizer == "ddp":
            raise ValueError(
                f"expert_mean = tokens needs {self.SECTION}optimizer = diloco, fedavg or "
                "local-adamw, got ddp"
            )

    def require_whole(self, what: str) -> None:
        """Raises ValueError, which says that `what` needs it, unless all of the model's parameters
        meet at the end of a round."""
        if self.apart or self.optimizer == "ddp":
            at = self.SECTION
            raise ValueError(
                f"{what} needs {at}fragments = 1, {at}overlap = 0, {at}expert_turns = 1 and "
                f"{at}optimizer = diloco, fedavg or local-adamw, got {self.fragments}, "
                f"{self.overlap}, {self.expert_turns} and {self.optimizer}"
            )

    @property
    def resolved_lr(self) -> float:
        """`outer_lr`, or its default."""
        return 1.0 if self.outer_lr is None else float(self.outer_lr)

    @property
    def resolved_momentum(self) -> float:
        """`outer_momentum`, or its default for the chosen optimizer."""
        default = 0.2 if self.optimizer == "diloco" else 0.0
        return default if self.outer_momentum is None else float(self.outer_momentum)

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
