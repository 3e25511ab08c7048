"""FLOPs, time and bandwidth of a job's rounds, and the paper's own formulas. Needs no torch.

Times are estimated from the bandwidth and latency of the link and the FLOP/s of a site. Functions
whose names begin with `paper_` are formulas of the FoMoE paper (arXiv 2606.19025, section on cost
models).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.placement import stale, wire
from fomoe_ext.placement.overlap import AUTO, chosen_overlap, most_overlap
from fomoe_ext.placement.placement import Placement
from fomoe_ext.placement.wire import Link
from fomoe_ext.plan.memory import job_memory
from fomoe_ext.plan.sizes import ModelSizes, sizes_of
from fomoe_ext.plan.traffic import (
    bucket_bytes,
    copied_bytes,
    copies_per_layer,
    job_placement,
    meeting_bytes,
    moved_bytes,
    shadow_bytes,
    site_elements,
    stale_share,
)


class TokenFlops(NamedTuple):
    """Floating-point operations of a forward pass per token (a multiply-add is two)."""

    attention: float
    router: float
    experts: float
    shared_experts: float
    unembedding: float
    stale_experts: float = 0.0

    @property
    def forward(self) -> float:
        """The whole forward pass."""
        return sum(self)

    @property
    def training(self) -> float:
        """Forward and backward pass: three times the forward pass, but twice for frozen copies,
        whose weights get no gradient."""
        return 3 * sum(self) - self.stale_experts


def flops_per_token(
    model: ModelConfig | ModelSizes, resident_share: float = 1.0, stale_share: float = 0.0
) -> TokenFlops:
    """FLOPs per token in sequences of `model.seq_len`, without norms and other vector operations.

    This is Eq. 3 of the paper with the matrix products written out, except that router scores are
    computed for all experts, as in `MoELayer`. The paper's factor sigma on the experts' FLOPs is
    `resident_share` with router_scope "global", where slots on absent experts are skipped (for an
    even load), and min(top_k, residents) / top_k with "resident". MLPs of dense blocks count as
    shared experts. Attention counts the causal half.

    Args:
        resident_share: Share of a layer's experts that a site holds, above 0 and up to 1.
        stale_share: Share of a layer's experts of which a site computes frozen copies.
    """
    if not 0 < resident_share <= 1:
        raise ValueError(f"resident_share must be in (0, 1], got {resident_share}")
    if not 0 <= stale_share <= 1 - resident_share + 1e-9:
        raise ValueError(
            f"stale_share must be in [0, 1 - resident_share = {1 - resident_share}], got "
            f"{stale_share}"
        )
    sizes = sizes_of(model)
    layers, top_k = sizes.num_layers, sizes.top_k
    if sizes.router_scope == "global":
        slots = top_k * resident_share
    else:
        slots = min(top_k, sizes.num_experts * resident_share)
    return TokenFlops(
        attention=2.0 * sizes.elements_of("attention") + sizes.attention_scores,
        router=layers * 2.0 * sizes.num_experts * sizes.hidden_size,
        experts=layers * slots * 2.0 * sizes.expert_matrices,
        shared_experts=2.0 * sizes.elements_of("shared"),
        unembedding=2.0 * sizes.elements_of("unembedding"),
        stale_experts=layers * top_k * stale_share * 2.0 * sizes.expert_matrices,
    )


# ------------------------------------------------------------------------------------------ time


class RoundCost(NamedTuple):
    """What a round costs a site.

    local_s: seconds of local steps. meeting_s: seconds of meetings; at most `hideable_s` of them
    can overlap with local steps. bytes_sent: in the round. memory: bytes, `SiteMemory.total`.
    flops: of all local steps. waits: exchanges that follow one another, each of which takes a
    latency. waves: sets of `in_flight` buckets that travel together, each of which takes at least a
    latency. overlap: local steps taken while a fragment is on its way; for overlap "auto" the
    number that it would choose.
    """

    local_s: float
    meeting_s: float
    bytes_sent: int
    memory: int
    flops: float
    waits: int
    waves: int
    hideable_s: float
    overlap: int = 0

    @property
    def hidden_s(self) -> float:
        """Seconds of meetings that overlap with local steps."""
        return min(self.meeting_s, self.hideable_s)

    @property
    def seconds(self) -> float:
        """Seconds of the whole round."""
        return self.local_s + self.meeting_s - self.hidden_s

    @property
    def utilization(self) -> float:
        """Share of the time in local steps, 0..1."""
        return self.local_s / self.seconds

    def over(self, link: Link) -> RoundCost:
        """The same round over another link."""
        sending_s = max(8 * self.bytes_sent / link.bandwidth, self.waves * link.latency)
        return self._replace(meeting_s=self.waits * link.latency + sending_s)

    def limit(self, link: Link) -> str:
        """What limits the meetings over this link: a key of `LIMITS`."""
        if not self.bytes_sent:
            return "nothing"
        if self.hidden_s == self.meeting_s:
            return "nothing: hidden"
        bandwidth_s = 8 * self.bytes_sent / link.bandwidth
        waves_s, waits_s = self.waves * link.latency, self.waits * link.latency
        if bandwidth_s >= max(waves_s, waits_s):
            return "bandwidth"
        return "latency x buckets" if waves_s > waits_s else "latency"


LIMITS = {
    "bandwidth": "the link is full; a codec with fewer bits, more local steps or less replication "
    "would help",
    "latency x buckets": "buckets travel in waves, and each wave takes at least a latency; larger "
    "buckets (--bucket-bytes) or more at once (--in-flight) would help, but take memory",
    "latency": "a few exchanges follow one another, which takes as long at any bandwidth; more "
    "local steps or --overlap would help",
    "nothing: hidden": "the local steps that overlap with the meetings take longer",
    "nothing": "there is only one site",
}
"""What can limit the meetings, with explanations. The time to encode is not modelled."""


def meeting_waits(config: TrainConfig, placement: Placement, site: int) -> tuple[int, int]:
    """How many exchanges of a round follow one another, and how many waves a site's buckets take.

    The exchanges are a note, then for each fragment a status, the first share, the last sum and the
    hashes. Between first share and last sum, buckets travel in waves of `in_flight`. ddp exchanges
    a status and buckets in every step. Frozen copies of experts come last; if they are not
    refreshed in every round, the mean over the rounds counts.
    """
    size, in_flight = wire.bucket_elements(bucket_bytes(config)), config.outer.in_flight
    waits, waves = 1 + _copy_waits(config, placement), 0
    for of_model in site_elements(config, placement, site):
        fragment = of_model.of_round(config.outer.expert_turns, config.outer.expert_turns)
        groups = fragment.parameters.items()
        buckets = sum(-(-n // size) for owners, n in groups if len(owners) > 1)
        of_fragment = -(-buckets // in_flight)
        pipe = 2 if buckets else 0
        waits += pipe + 2 + _tells_numbers(config)
        waves += of_fragment
        if config.outer.optimizer == "ddp":
            steps = config.run.local_steps
            waits += steps * (1 + (config.inner.grad_clip > 0) + pipe)
            waves += steps * of_fragment
    return waits, waves


def _tells_numbers(config: TrainConfig) -> bool:
    """Whether sites send each other numbers before a meeting, in addition to their statuses."""
    outer = config.outer
    by_tokens = outer.counts_tokens or config.inner.uneven_steps
    return by_tokens or outer.clip_delta > 0 or outer.overlap == AUTO


def _copy_waits(config: TrainConfig, placement: Placement) -> int:
    outer, count = config.outer, copies_per_layer(config)
    if not count:
        return 0
    wanted = [(tuple(range(count)),)] * placement.num_layers  # the same number at each site
    sizes = [sizes_of(config.model).expert] * placement.num_layers
    most_bytes = bucket_bytes(config) * outer.in_flight
    waits = len(stale.copy_waves(wanted, sizes, outer.stale_codec, most_bytes))
    return -(-waits // outer.stale_period)


def sent_bytes(config: TrainConfig, placement: Placement, site: int) -> int:
    """Bytes that a site sends per round, averaged over what happens only every few rounds."""
    cycle = config.outer.expert_turns
    rounds = [meeting_bytes(config, placement, site, index + 1) for index in range(cycle)]
    sent = sum(rounds) // cycle + shadow_bytes(config, placement, site)
    if config.outer.stale_period > 1:
        sent += copied_bytes(config, placement, site) // config.outer.stale_period
    every = config.sites.reshuffle_rounds
    if every:
        new = job_placement(config, 1)
        sent += moved_bytes(config, placement, new, site) // every
    return sent


def round_cost(
    config: TrainConfig, placement: Placement, link: Link, flops_per_s: float, site: int
) -> RoundCost:
    """The cost of a round at a site: local steps and meetings.

    With overlap, each fragment's exchange is hidden for as long as its `overlap` steps take, and
    all exchanges together for at most the steps of the round. With `reshuffle_rounds`, the bytes of
    a reshuffle are divided by that number of rounds.

    `flops_per_s`: what the site reaches in training. Raises ValueError unless bandwidth and
    `flops_per_s` are above 0 and the latency is at least 0.
    """
    if not (link.bandwidth > 0 and link.latency >= 0 and flops_per_s > 0):
        raise ValueError(
            f"bandwidth and flops_per_s must be > 0 and latency at least 0, got {link.bandwidth}, "
            f"{flops_per_s} and {link.latency}"
        )
    sent = sent_bytes(config, placement, site)
    waits, waves = meeting_waits(config, placement, site)
    share = placement.replication / placement.num_sites
    tokens = config.inner.batch_size * config.model.seq_len * config.run.local_steps
    flops = tokens * flops_per_token(config.model, share, stale_share(config)).training
    local_s = flops / flops_per_s
    sending_s = max(8 * sent / link.bandwidth, waves * link.latency)
    meeting_s = waits * link.latency + sending_s
    steps, fragments = config.run.local_steps, config.outer.fragments
    of_fragment = meeting_s / fragments * steps / local_s
    behind = overlap_steps(config.outer.overlap, of_fragment, steps)
    # Over another link "auto" would choose another overlap, up to the longest possible one.
    most = most_overlap(steps) if config.outer.overlap == AUTO else behind
    return RoundCost(
        local_s=local_s,
        meeting_s=meeting_s,
        bytes_sent=sent,
        memory=job_memory(config, placement, site).total,
        flops=flops,
        waits=waits,
        waves=waves,
        hideable_s=min(1.0, most * fragments / steps) * local_s,
        overlap=behind,
    )


def overlap_steps(overlap: int | str, exchange_steps: float, local_steps: int) -> int:
    """The overlap in steps; "auto" chooses it for an exchange as long as `exchange_steps` steps."""
    return chosen_overlap(exchange_steps, local_steps) if overlap == AUTO else int(overlap)


def most_utilization(cost: RoundCost, latency: float) -> float:
    """The utilization (share of the time in local steps) with unlimited bandwidth."""
    return cost.over(Link(math.inf, latency)).utilization


def bandwidth_needed(cost: RoundCost, utilization: float, latency: float) -> float | None:
    """Bits per second with which a share `utilization` of the time is spent in local steps.

    None if the latency alone takes too long (see `most_utilization`). Raises ValueError unless
    0 < utilization < 1.
    """
    if not 0 < utilization < 1:
        raise ValueError(f"utilization must be in (0, 1), got {utilization}")
    left = cost.local_s * (1 - utilization) / utilization + cost.hideable_s - cost.waits * latency
    if left <= 0 or left < cost.waves * latency:
        return None
    return 8 * cost.bytes_sent / left


# ------------------------------------------------------------------------------ the paper's model


def paper_ring_bytes(payload: float, members: int) -> float:
    """Bytes each of n `members` sends in a ring all-reduce of `payload` bytes: 2 (n - 1) / n."""
    return 2.0 * (members - 1) / members * payload


def paper_round_bytes(
    dense: float,
    sparse: float,
    num_sites: int,
    replication: int,
    *,
    bytes_per_parameter: float = 2.0,
    reshuffles_per_round: float = 0.0,
    moments: bool = False,
) -> float:
    """Bytes that a site sends per round by the paper's formula: dense and sparse traffic.

    `dense` and `sparse` are numbers of parameters of the whole model. With M sites,
    O = `replication` and gamma = `reshuffles_per_round`,
    B = 2(M-1)/M S_dense + (2(O-1)/O + gamma (1 - O/M)) (O/M) S_sparse, times 3 for LocalAdamW
    (`moments`). The paper's payload is bf16, 2 bytes per parameter.
    """
    if not 1 <= replication <= num_sites:
        raise ValueError(f"replication must be in [1, num_sites = {num_sites}], got {replication}")
    held = replication / num_sites
    ring = 2.0 * (replication - 1) / replication
    moved = reshuffles_per_round * (1.0 - held)
    total = paper_ring_bytes(dense, num_sites) + (ring + moved) * held * sparse
    return total * bytes_per_parameter * (3 if moments else 1)


def paper_memory_bytes(dense: float, sparse: float, num_sites: int, replication: int) -> float:
    """Bytes per site by the paper: 18 per parameter (fp16 and fp32 weight, moments, gradient)."""
    return 18.0 * (dense + sparse * replication / num_sites)


def paper_cumulative_bytes(round_bytes: float, rounds: int) -> float:
    """Bytes that a site has sent after `rounds` rounds, as the paper's figures 5 and 6 count them:
    without a meeting after the last round."""
    return (rounds - 1) * round_bytes
