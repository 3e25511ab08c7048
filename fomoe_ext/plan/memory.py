"""The memory that a site of a job needs. Needs no torch.

Parameters, gradients, optimizer state and outer state are counted. Activations are not. The buffers
of a meeting are counted in `meeting_memory` alone.
"""

from __future__ import annotations

from typing import NamedTuple

from fomoe_ext.checks import one_of
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig, ParameterCounts
from fomoe_ext.placement import buckets, wire
from fomoe_ext.placement.overlap import AUTO, most_overlap
from fomoe_ext.placement.placement import Placement
from fomoe_ext.placement.spread import chunk_sizes
from fomoe_ext.plan.sizes import ModelSizes, sizes_of
from fomoe_ext.plan.traffic import (
    bucket_bytes,
    copies_per_layer,
    full_replica,
    job_placement,
    model_sizes,
    rank_experts,
    shadow_memory,
    site_elements,
)

FLOAT_BYTES = 4
"""Parameters, gradients, moments, anchor and momentum are fp32."""


class SiteMemory(NamedTuple):
    """Bytes that a site holds, without activations and the buffers of a meeting."""

    parameters: int
    gradients: int
    inner_state: int
    anchor: int
    outer_state: int
    error_feedback: int
    stale_copies: int = 0
    shadow_copies: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self)


def site_parameters(
    model: ModelConfig | ModelSizes, placement: Placement | None, site: int | None = None
) -> ParameterCounts:
    """Number of parameters at a site, by kind; `placement` None = a full replica, without `site`.

    Raises ValueError for a placement without a site.
    """
    whole = sizes_of(model).counts
    if placement is None:
        return whole
    if site is None:
        raise ValueError("site must be given with a placement, got None")
    return whole._replace(sparse=placement.num_resident(site) * sizes_of(model).expert)


def site_memory(
    model: ModelConfig | ModelSizes,
    placement: Placement | None,
    site: int | None = None,
    *,
    optimizer: str = "diloco",
    inner_optimizer: str = "adamw",
    outer_momentum: float | None = None,
    error_feedback: int = 0,
    stale_experts: int = 0,
) -> SiteMemory:
    """Bytes of parameters and optimizer state at a site; `placement` None = a full replica.

    With router_scope "resident", router rows of absent experts are never averaged and so have no
    anchor.

    Args:
        site: Needed with a placement.
        optimizer: As in `OuterConfig`. All but ddp keep an anchor.
        inner_optimizer: adamw keeps two moments, sgd one.
        outer_momentum: Above 0, the momentum takes as much as the anchor (not with ddp); None = the
            default, which is above 0 only for diloco.
        error_feedback: Number of elements.
        stale_experts: Number of frozen copies over all layers.

    Raises ValueError for a placement without a site.
    """
    one_of(wire.OPTIMIZERS, optimizer=optimizer)
    one_of(("adamw", "sgd"), inner_optimizer=inner_optimizer)
    momentum = optimizer == "diloco" if outer_momentum is None else outer_momentum > 0
    held = site_parameters(model, placement, site)
    unit = met = FLOAT_BYTES * held.total
    if model.router_scope == "resident" and placement is not None:
        experts = held.sparse // sizes_of(model).expert
        absent = model.num_layers * placement.num_experts - experts
        met -= FLOAT_BYTES * absent * model_sizes(model).router_row
    return SiteMemory(
        parameters=unit,
        gradients=unit,
        inner_state=unit * (2 if inner_optimizer == "adamw" else 1),
        anchor=0 if optimizer == "ddp" else met,
        outer_state=met if momentum and optimizer != "ddp" else 0,
        error_feedback=FLOAT_BYTES * error_feedback,
        stale_copies=FLOAT_BYTES * stale_experts * sizes_of(model).expert,
    )


def job_memory(
    config: TrainConfig, placement: Placement | None, site: int | None = None
) -> SiteMemory:
    """`site_memory` for a job's model, optimizers and codec, summed over the ranks of the site.

    `placement` None = a full replica, the same at all sites. Raises ValueError for a placement
    without a site.
    """
    if placement is not None and site is None:
        raise ValueError("site must be given with a placement, got None")
    of_job, site = placement or job_placement(full_replica(config)), site or 0
    if config.sites.ranks_per_site > 1:
        ranks = rank_memories(config, of_job, site)
        return SiteMemory(*(sum(parts) for parts in zip(*ranks, strict=True)))
    feedback = 0
    if feeds_back(config):
        bucket = bucket_bytes(config)
        feedback = sum(
            n + wire.own_elements(n, len(owners), config.outer.codec, bucket)
            for fragment in site_elements(config, of_job, site)
            for owners, n in fragment.parameters.items()
            if len(owners) > 1
        )
    own = site_memory(
        config.model,
        placement,
        site,
        optimizer=config.outer.optimizer,
        inner_optimizer=config.inner.inner_optimizer,
        outer_momentum=config.outer.resolved_momentum,
        error_feedback=feedback,
        stale_experts=0 if placement is None else _copies_held(config, placement),
    )
    return own._replace(shadow_copies=shadow_memory(config, of_job, site))


def meeting_memory(config: TrainConfig, placement: Placement, site: int) -> int:
    """Bytes that a rank needs in addition during a meeting, for the buckets on their way.

    Each rank of a site has its own buckets. With overlap, all buckets of a fragment are on their
    way at once, and so are those of other fragments whose exchanges overlap in time.
    """
    outer, at_once = config.outer, 1
    if outer.overlap:
        overlap = most_overlap(config.run.local_steps) if outer.overlap == AUTO else outer.overlap
        at_once = min(outer.fragments, -(-overlap * outer.fragments // config.run.local_steps))
    codecs = buckets.codecs_of(outer.optimizer, outer.codec, outer.resolved_moment_codecs)
    elements, size = site_elements(config, placement, site), bucket_bytes(config)
    whole, ranks = bool(outer.overlap) or config.fault.tolerant, config.sites.ranks_per_site
    return at_once * max(
        buckets.buffer_bytes(elements, codec, size, outer.in_flight, ranks=ranks, whole=whole)
        for codec in codecs
    )


def _copies_held(config: TrainConfig, placement: Placement) -> int:
    return copies_per_layer(config) * placement.num_layers


def rank_memories(config: TrainConfig, placement: Placement, site: int) -> list[SiteMemory]:
    """Bytes at each rank of a site.

    Ranks divide the experts among them (once per replica), dense parameters by rows, and the state
    of the outer optimizer by buckets.
    """
    sites, model, outer = config.sites, config.model, config.outer
    sharing = sites.ranks_per_site // sites.replicas
    cuts = rank_experts(config, placement, site)
    if cuts is None:
        chunks = chunk_sizes(placement.experts_per_site, sharing)
        held = [placement.num_layers * chunk for chunk in chunks]
    else:
        held = [sum(len(cut[rank]) for cut in cuts) for rank in range(sharing)]
    sets = wire.owner_sets(placement)
    shared = [
        (owners, numel, sets.index(owners) + number)
        for number, fragment in enumerate(site_elements(config, placement, site))
        for owners, numel in fragment.parameters.items()
    ]
    anchors = 0 if outer.optimizer == "ddp" else 1
    momenta = anchors if outer.resolved_momentum > 0 else 0
    bucket = bucket_bytes(config)
    result = []
    for rank in range(sites.ranks_per_site):
        experts = held[rank % sharing] * sizes_of(model).expert
        unit = FLOAT_BYTES * (experts + _dense_share(model, rank, sites.ranks_per_site))
        kept = lost = 0
        for owners, numel, turn in shared:
            mine = wire.lane_elements(numel, turn, rank, sites.ranks_per_site, bucket)
            kept += mine
            if len(owners) > 1 and feeds_back(config):
                lost += mine + wire.own_elements(mine, len(owners), outer.codec, bucket)
        result.append(
            SiteMemory(
                parameters=unit,
                gradients=unit,
                inner_state=unit * (2 if config.inner.inner_optimizer == "adamw" else 1),
                anchor=FLOAT_BYTES * anchors * kept,
                outer_state=FLOAT_BYTES * momenta * kept,
                error_feedback=FLOAT_BYTES * lost,
                stale_copies=FLOAT_BYTES * _copies_held(config, placement) * sizes_of(model).expert,
            )
        )
    return result


def _dense_share(model: ModelConfig | ModelSizes, rank: int, ranks: int) -> int:
    """Elements of dense parameters and routers at a rank: an equal run of rows of each tensor."""
    sizes = sizes_of(model)
    tensors = [(weight.rows, weight.row_size, weight.times) for weight in sizes.dense]
    # A router's biases, one per row, are another tensor that is divided in the same way.
    tensors.append((sizes.num_experts, sizes.router_row, sizes.num_layers))

    def held(rows: int) -> int:
        each = -(-rows // ranks)
        return min(rows, each * (rank + 1)) - min(rows, each * rank)

    return sum(held(rows) * size * times for rows, size, times in tensors)


def feeds_back(config: TrainConfig) -> bool:
    """Whether a job uses error feedback."""
    return config.outer.codec != "fp32" and config.outer.error_feedback
