"""The cost model of a job: bytes sent, memory, arithmetic and time of each site. Needs no torch.

Bytes are exact: `meeting_bytes` and `moved_bytes` are what the training job counts where it sends.
Memory counts parameters, gradients, optimizer and outer state, not activations. Time is a model: a
link of a bandwidth and a latency, a site of so many FLOP/s. The paper's own formulas (arXiv
2606.19025, section on cost models) are the functions that begin with `paper_`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fomoe_ext import wire
from fomoe_ext.config import (
    ModelConfig,
    ParameterCounts,
    TrainConfig,
    block_parameters,
    count_parameters,
    expert_matrices,
    expert_parameters,
)
from fomoe_ext.placement import Placement
from fomoe_ext.spread import measured_load, spread_experts
from fomoe_ext.wire import Link

FLOAT_BYTES = 4
"""Parameters, gradients, moments, anchor and momentum are fp32."""


class RoundNote(NamedTuple):
    """What every site tells every other one before a meeting, a fp64 each.

    stop: 1 when it was asked to stop. steps: local steps it has taken in all. loss: its sum over
    the round's steps, nats per token. rows and slots: of the round.
    """

    stop: float
    steps: float
    loss: float
    rows: float
    slots: float


NOTE_BYTES = 8 * len(RoundNote._fields)


# ------------------------------------------------------------------------------------- placement


def read_placement(path: Path, num_sites: int) -> Placement:
    """The placement in a JSON file, a table [layer][expert] -> list of sites.

    Raises FileNotFoundError for a missing file, ValueError for what is no valid table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"placement_file {path} does not exist") from None
    except (ValueError, IsADirectoryError) as error:
        raise ValueError(f"placement_file {path} is not a JSON file: {error}") from None
    try:
        return Placement.from_table(table, num_sites)
    except ValueError as error:
        raise ValueError(f"placement_file {path}: {error}") from None


def job_placement(config: TrainConfig, epoch: int = 0) -> Placement:
    """The placement a job begins with, or a random one after `epoch` reshuffles.

    Raises ValueError for an impossible one, or a table that is not of the model's layers and
    experts; FileNotFoundError for a missing table.
    """
    sites, model = config.sites, config.model
    sizes = (sites.sites, model.num_experts, model.num_layers, sites.replication)
    if sites.placement_file is not None:
        placement = read_placement(sites.placement_file, sites.sites)
        wanted = (model.num_layers, model.num_experts, sites.replication)
        found = (placement.num_layers, placement.num_experts, placement.replication)
        if wanted != found:
            raise ValueError(
                f"placement_file {sites.placement_file} must have (num_layers, num_experts, "
                f"replication) = {wanted}, got {found}"
            )
        return placement
    if sites.placement == "random":
        return Placement.random(*sizes, seed=config.run.seed, epoch=epoch)
    return Placement.cyclic(*sizes)


def rank_experts(
    config: TrainConfig, placement: Placement, site: int
) -> list[tuple[tuple[int, ...], ...]] | None:
    """By layer and rank, the experts of a site that each rank holds; None = ascending by id.

    Raises ValueError or FileNotFoundError for a load that is not of this model.
    """
    sites = config.sites
    if sites.spread_by is None:
        return None
    load = measured_load(sites.spread_by)
    if [len(row) for row in load] != [placement.num_experts] * placement.num_layers:
        raise ValueError(
            f"spread_by {sites.spread_by} must have the load of {placement.num_layers} layers of "
            f"{placement.num_experts} experts, got {len(load)} layers"
        )
    ranks = sites.ranks_per_site // sites.replicas
    return [
        spread_experts(placement.resident(layer, site), ranks, load[layer])
        for layer in range(placement.num_layers)
    ]


def full_replica(config: TrainConfig) -> TrainConfig:
    """The same job with every expert on every site."""
    sites = dataclasses.replace(
        config.sites,
        replication=config.sites.sites,
        placement="cyclic",
        placement_file=None,
        reshuffle_rounds=0,
    )
    return dataclasses.replace(config, sites=sites)


# ----------------------------------------------------------------------------------------- bytes


def model_sizes(model: ModelConfig) -> wire.Sizes:
    """Elements outside of the blocks, of a block, of one expert and of one router row."""
    dense, in_blocks = count_parameters(model).dense, block_parameters(model)
    outside = dense - model.num_layers * in_blocks
    return wire.Sizes(outside, in_blocks, expert_parameters(model), model.hidden_size)


def _elements(
    config: TrainConfig, placement: Placement, site: int
) -> tuple[wire.GroupElements, ...]:
    return wire.group_elements(
        placement,
        site,
        model_sizes(config.model),
        router_scope=config.model.router_scope,
        selection_bias=config.model.balance == "bias",
        fragments=config.outer.fragments,
    )


def meeting_bytes(
    config: TrainConfig, placement: Placement, site: int, round_index: int = 1
) -> int:
    """Bytes a site sends in a round, in its meetings (with ddp: in all its steps) and before them.

    `round_index` counts from 1; it matters where moments have periods.
    """
    experts = placement.num_layers * placement.num_experts
    return (placement.num_sites - 1) * NOTE_BYTES + wire.round_bytes(
        _elements(config, placement, site),
        placement.num_sites,
        optimizer=config.outer.optimizer,
        codec=config.outer.codec,
        bucket_bytes=config.outer.bucket_bytes,
        local_steps=config.run.local_steps,
        clip=config.inner.grad_clip > 0,
        round_index=round_index,
        moment_periods=config.outer.moment_periods,
        moment_codecs=config.outer.resolved_moment_codecs,
        counted_experts=experts if config.outer.expert_mean == "tokens" else 0,
    )


def moved_bytes(config: TrainConfig, placement: Placement, new: Placement, site: int) -> int:
    """Bytes a site sends when a new placement comes into force."""
    return wire.reshuffle_bytes(
        placement,
        new,
        site,
        model_sizes(config.model),
        optimizer=config.outer.optimizer,
        router_scope=config.model.router_scope,
        selection_bias=config.model.balance == "bias",
        outer_momentum=config.outer.resolved_momentum > 0,
    )


def full_replica_bytes(config: TrainConfig, rounds: int, first: int = 0) -> int:
    """Bytes a site would send in `rounds` rounds of the same job with all experts everywhere, but
    for the `first` of them."""
    replica = full_replica(config)
    placement = job_placement(replica)
    return sum(meeting_bytes(replica, placement, 0, index + 1) for index in range(first, rounds))


def ddp_bytes(config: TrainConfig, steps: int) -> int:
    """Bytes a site would send in `steps` steps of plain DDP: all gradients, fp32, every step."""
    total = count_parameters(config.model).total
    sites, bucket = config.sites.sites, config.outer.bucket_bytes
    return steps * wire.all_reduce_bytes(total, sites, "fp32", bucket)


# ----------------------------------------------------------------------------------------- memory


class SiteMemory(NamedTuple):
    """Bytes that one site holds, without activations and buffers of a meeting."""

    parameters: int
    gradients: int
    inner_state: int
    anchor: int
    outer_state: int
    error_feedback: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def site_parameters(model: ModelConfig, placement: Placement | None, site: int) -> ParameterCounts:
    """Parameters that a site holds by kind; `placement` None = a full replica."""
    whole = count_parameters(model)
    if placement is None:
        return whole
    experts = sum(len(placement.resident(layer, site)) for layer in range(model.num_layers))
    return whole._replace(sparse=experts * expert_parameters(model))


def site_memory(
    model: ModelConfig,
    placement: Placement | None,
    site: int = 0,
    *,
    optimizer: str = "diloco",
    inner_optimizer: str = "adamw",
    outer_momentum: float | None = None,
    error_feedback: int = 0,
) -> SiteMemory:
    """Bytes of parameters and state on a site; `placement` None = a full replica.

    `optimizer` as in `OuterConfig`: ddp needs no anchor; with outer momentum (None = the default,
    diloco alone has it) the others keep that too. `inner_optimizer` adamw keeps two moments, sgd
    one. `error_feedback`: elements of it.
    """
    _one_of("optimizer", optimizer, ("diloco", "fedavg", "local-adamw", "ddp"))
    _one_of("inner_optimizer", inner_optimizer, ("adamw", "sgd"))
    momentum = optimizer == "diloco" if outer_momentum is None else outer_momentum > 0
    unit = FLOAT_BYTES * site_parameters(model, placement, site).total
    return SiteMemory(
        parameters=unit,
        gradients=unit,
        inner_state=unit * (2 if inner_optimizer == "adamw" else 1),
        anchor=0 if optimizer == "ddp" else unit,
        outer_state=unit if momentum and optimizer != "ddp" else 0,
        error_feedback=FLOAT_BYTES * error_feedback,
    )


def job_memory(config: TrainConfig, placement: Placement | None, site: int = 0) -> SiteMemory:
    """`site_memory` of a job's model with its optimizers and codec, of all ranks of the site."""
    of_job = placement or job_placement(full_replica(config))
    if config.sites.ranks_per_site > 1:
        ranks = rank_memories(config, of_job, site)
        return SiteMemory(*(sum(parts) for parts in zip(*ranks, strict=True)))
    feedback = 0
    if _feeds_back(config):
        feedback = sum(
            n + wire.own_elements(n, len(owners), config.outer.codec, config.outer.bucket_bytes)
            for fragment in _elements(config, of_job, site)
            for owners, n in fragment.parameters.items()
            if len(owners) > 1
        )
    return site_memory(
        config.model,
        placement,
        site,
        optimizer=config.outer.optimizer,
        inner_optimizer=config.inner.inner_optimizer,
        outer_momentum=config.outer.resolved_momentum,
        error_feedback=feedback,
    )


def rank_memories(config: TrainConfig, placement: Placement, site: int) -> list[SiteMemory]:
    """Bytes on each rank of a site: experts as they are shared out (once per replica), dense
    parameters by rows, what the outer optimizer keeps by buckets.
    """
    sites, model, outer = config.sites, config.model, config.outer
    sharing = sites.ranks_per_site // sites.replicas
    cuts = rank_experts(config, placement, site) or [
        spread_experts(placement.resident(layer, site), sharing)
        for layer in range(placement.num_layers)
    ]
    sets = wire.owner_sets(placement)
    anchors = 0 if outer.optimizer == "ddp" else 1
    momenta = anchors if outer.resolved_momentum > 0 else 0
    result = []
    for rank in range(sites.ranks_per_site):
        experts = sum(len(cut[rank % sharing]) for cut in cuts) * expert_parameters(model)
        unit = FLOAT_BYTES * (experts + _dense_share(model, rank, sites.ranks_per_site))
        kept = lost = 0
        for number, fragment in enumerate(_elements(config, placement, site)):
            for owners, numel in fragment.parameters.items():
                turn = sets.index(owners) + number
                mine = wire.lane_elements(
                    numel, turn, rank, sites.ranks_per_site, outer.bucket_bytes
                )
                kept += mine
                if len(owners) > 1 and _feeds_back(config):
                    codec, size = outer.codec, outer.bucket_bytes
                    lost += mine + wire.own_elements(mine, len(owners), codec, size)
        result.append(
            SiteMemory(
                parameters=unit,
                gradients=unit,
                inner_state=unit * (2 if config.inner.inner_optimizer == "adamw" else 1),
                anchor=FLOAT_BYTES * anchors * kept,
                outer_state=FLOAT_BYTES * momenta * kept,
                error_feedback=FLOAT_BYTES * lost,
            )
        )
    return result


def _dense_share(model: ModelConfig, rank: int, ranks: int) -> int:
    """Elements of dense parameters and routers that a rank holds: of each, rows in equal runs."""
    width, layers, shared = model.hidden_size, model.num_layers, model.shared_expert_size
    wide = expert_matrices(model, shared) // width - shared
    tensors = [
        (model.vocab_size, width, 1),
        (3 * width, width, layers),
        (width, width, layers),
        (model.num_experts, width, layers),
        (wide, width, layers),
        (width, shared, layers),
        (width, 1, 4 * layers + 2),
    ]

    def held(rows: int) -> int:
        each = -(-rows // ranks)
        return min(rows, each * (rank + 1)) - min(rows, each * rank)

    return sum(held(rows) * size * times for rows, size, times in tensors)


def _feeds_back(config: TrainConfig) -> bool:
    return config.outer.codec != "fp32" and config.outer.error_feedback


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


# ------------------------------------------------------------------------------------- arithmetic


class TokenFlops(NamedTuple):
    """Floating-point operations of a forward pass per token (a multiply-add is two)."""

    attention: float
    router: float
    experts: float
    shared_experts: float
    unembedding: float

    @property
    def forward(self) -> float:
        """All of the forward pass."""
        return sum(self)

    @property
    def training(self) -> float:
        """Forward and backward: three times the forward pass."""
        return 3 * sum(self)


def flops_per_token(model: ModelConfig, resident_share: float = 1.0) -> TokenFlops:
    """FLOPs per token of a sequence of `model.seq_len`; norms and other vector work are left out.

    `resident_share` in 0..1 is the share of experts a site holds. With router_scope "global" slots
    on the others are skipped: with an even load the experts' work is times that share. With
    "resident" a token still has min(top_k, residents) experts. Attention counts the causal half.
    """
    if not 0 < resident_share <= 1:
        raise ValueError(f"resident_share must be in (0, 1], got {resident_share}")
    width, layers = model.hidden_size, model.num_layers
    if model.router_scope == "global":
        slots = model.top_k * resident_share
    else:
        slots = min(model.top_k, model.num_experts * resident_share)
    return TokenFlops(
        attention=layers * (8.0 * width**2 + 2.0 * (model.seq_len + 1) * width),
        router=layers * 2.0 * model.num_experts * width,
        experts=layers * slots * 2.0 * expert_matrices(model),
        shared_experts=layers * 2.0 * expert_matrices(model, model.shared_expert_size),
        unembedding=2.0 * model.vocab_size * width,
    )


# ------------------------------------------------------------------------------------------ time


class RoundCost(NamedTuple):
    """What a round costs a site.

    local_s: seconds of arithmetic. meeting_s: seconds of sending, of which `hidden_s` pass while
    local steps go on (`hideable_s` could). bytes_sent. memory: bytes, as `SiteMemory.total`. flops:
    of all local steps. waits: exchanges one after the other, each of which costs a latency. waves:
    times that `in_flight` buckets travel; a latency each at the least.
    """

    local_s: float
    meeting_s: float
    bytes_sent: int
    memory: int
    flops: float
    waits: int
    waves: int
    hideable_s: float

    @property
    def hidden_s(self) -> float:
        """Seconds of meetings behind local steps."""
        return min(self.meeting_s, self.hideable_s)

    @property
    def utilization(self) -> float:
        """Share of the time in local steps, 0..1."""
        return self.local_s / (self.local_s + self.meeting_s - self.hidden_s)


def meeting_waits(config: TrainConfig, placement: Placement, site: int) -> tuple[int, int]:
    """Exchanges of a round that a site waits for one after the other, and waves of its buckets.

    A note, then for every fragment a status, the first share, the last sum and the hashes. Between
    these, `in_flight` buckets are under way at once. ddp has a status and buckets in every step.
    """
    size, in_flight = wire.bucket_elements(config.outer.bucket_bytes), config.outer.in_flight
    waits, waves = 1, 0
    for fragment in _elements(config, placement, site):
        groups = fragment.parameters.items()
        buckets = sum(-(-n // size) for owners, n in groups if len(owners) > 1)
        of_fragment = -(-buckets // in_flight)
        pipe = 2 if buckets else 0
        waits += pipe + 2 + (config.outer.expert_mean == "tokens")
        waves += of_fragment
        if config.outer.optimizer == "ddp":
            steps = config.run.local_steps
            waits += steps * (1 + (config.inner.grad_clip > 0) + pipe)
            waves += steps * of_fragment
    return waits, waves


def round_cost(
    config: TrainConfig, placement: Placement, link: Link, flops_per_s: float, site: int = 0
) -> RoundCost:
    """The cost of a round of a job: local steps and meetings.

    With overlap, of each fragment's exchange as much is hidden as its `overlap` steps take.
    `flops_per_s`: what a site reaches in training. With `reshuffle_rounds` the experts moved by one
    reshuffle are spread over its rounds. Raises ValueError unless bandwidth and `flops_per_s` are
    positive and the latency is not negative.
    """
    if not (link.bandwidth > 0 and link.latency >= 0 and flops_per_s > 0):
        raise ValueError(
            f"bandwidth and flops_per_s must be > 0 and latency >= 0, got {link.bandwidth}, "
            f"{flops_per_s} and {link.latency}"
        )
    sent = meeting_bytes(config, placement, site)
    waits, waves = meeting_waits(config, placement, site)
    every = config.sites.reshuffle_rounds
    if every:
        new = job_placement(config, 1)
        sent += moved_bytes(config, placement, new, site) // every
    share = placement.replication / placement.num_sites
    tokens = config.inner.batch_size * config.model.seq_len * config.run.local_steps
    flops = tokens * flops_per_token(config.model, share).training
    local_s = flops / flops_per_s
    behind = config.outer.overlap * config.outer.fragments / config.run.local_steps
    return RoundCost(
        local_s=local_s,
        meeting_s=waits * link.latency + max(8 * sent / link.bandwidth, waves * link.latency),
        bytes_sent=sent,
        memory=job_memory(config, placement, site).total,
        flops=flops,
        waits=waits,
        waves=waves,
        hideable_s=behind * local_s,
    )


def bandwidth_needed(cost: RoundCost, utilization: float, latency: float) -> float | None:
    """Bits per second for a share `utilization` of the time in local steps; None = not by any.

    Raises ValueError unless 0 < utilization < 1.
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
    """Bytes a site sends per round by the paper's formula, for numbers of parameters of the model.

    B = 2(M-1)/M S_dense + (2(O-1)/O + gamma (1 - O/M)) (O/M) S_sparse, times 3 for LocalAdamW
    (`moments`), with M sites, O = replication and gamma = `reshuffles_per_round`. Their payload is
    bf16.
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
