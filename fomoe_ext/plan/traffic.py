"""A job's placement, and the bytes that each of its sites sends. Needs no torch.

Bytes are exact: `meeting_bytes` and `moved_bytes` equal what a training job counts when it sends.
The rest of the cost model is in `fomoe_ext.plan.memory` and `fomoe_ext.plan.cost`.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.model import ModelConfig
from fomoe_ext.files.json_values import loads
from fomoe_ext.placement import buckets, stale, wire
from fomoe_ext.placement.placement import Placement
from fomoe_ext.placement.spread import spread_experts
from fomoe_ext.plan.sizes import ModelSizes, sizes_of
from fomoe_ext.report.measured import measured_coactivation, measured_load


class RoundNote(NamedTuple):
    """The note that each site sends to every other one before a meeting, one fp64 per field.

    stop: 1 if the site was asked to stop. steps: local steps it has taken since the job began.
    loss: the sum of the round's losses, nats per token. rows: rows that its experts computed in the
    round. slots: slots that its routers chose in the round. knocks: 1 if it knows of a site that
    asks to join. taken: steps of the round it has taken. left: steps of the round it has yet to
    take, above 0 only if it was asked to stop. pace: seconds of one of its local steps, 0 = not
    known.
    """

    stop: float
    steps: float
    loss: float
    rows: float
    slots: float
    knocks: float = 0.0
    taken: float = 0.0
    left: float = 0.0
    pace: float = 0.0


NOTE_BYTES = 8 * len(RoundNote._fields)


# ------------------------------------------------------------------------------------- placement


def read_placement(path: Path, num_sites: int) -> Placement:
    """The placement in a JSON file with a table [layer][expert] -> list of sites.

    Raises FileNotFoundError for a missing file, ValueError for an invalid table.
    """
    try:
        table = loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"placement_file {path} does not exist") from None
    except (ValueError, IsADirectoryError) as error:
        raise ValueError(f"placement_file must be a JSON file, got {path}: {error}") from None
    try:
        return Placement.from_table(table, num_sites)
    except ValueError as error:
        raise ValueError(f"placement_file {path}: {error}") from None


def job_placement(config: TrainConfig, epoch: int = 0) -> Placement:
    """The placement with which a job starts, or a random one after `epoch` reshuffles.

    Raises ValueError for impossible sizes, or for a table of other sizes than the model's, and
    FileNotFoundError for a missing table.
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
    if sites.placement_by is not None:
        counts = measured_coactivation(sites.placement_by, "placement_by")
        if counts.shape[:2] != (model.num_layers, model.num_experts):
            raise ValueError(
                f"placement_by {sites.placement_by} must have the counts of {model.num_layers} "
                f"layers of {model.num_experts} experts, got {counts.shape[0]} of {counts.shape[1]}"
            )
        together = sites.placement == "together"
        return Placement.from_coactivation(
            counts, num_sites=sites.sites, replication=sites.replication, together=together
        )
    seed = config.run.seed if sites.placement == "random" else None
    return _made(*sizes, seed, epoch)


@lru_cache(maxsize=8)
def _made(
    sites: int, experts: int, layers: int, replication: int, seed: int | None, epoch: int
) -> Placement:
    """A placement, which all jobs of a plan with the same sizes and seed share."""
    sizes = {
        "num_sites": sites,
        "num_experts": experts,
        "num_layers": layers,
        "replication": replication,
    }
    if seed is None:
        return Placement.cyclic(**sizes)
    return Placement.random(**sizes, seed=seed, epoch=epoch)


def rank_experts(
    config: TrainConfig, placement: Placement, site: int
) -> list[tuple[tuple[int, ...], ...]] | None:
    """For each layer and rank of a site, the experts that the rank holds; None = in order of ids.

    Raises ValueError or FileNotFoundError for the load of another model.
    """
    sites = config.sites
    if sites.spread_by is None:
        return None
    load = _load_of("spread_by", sites.spread_by, placement)
    ranks = sites.ranks_per_site // sites.replicas
    return [
        spread_experts(placement.resident(layer, site), ranks, load[layer])
        for layer in range(placement.num_layers)
    ]


def _load_of(name: str, path: Path, placement: Placement) -> list[list[float]]:
    """The load of a placement's experts, from a file. `name`: the option, for messages."""
    load = measured_load(path, name)
    if [len(row) for row in load] != [placement.num_experts] * placement.num_layers:
        raise ValueError(
            f"{name} {path} must have the load of {placement.num_layers} layers of "
            f"{placement.num_experts} experts, got {len(load)} layers"
        )
    return load


def full_replica(config: TrainConfig) -> TrainConfig:
    """The same job with every expert on every site."""
    sites = dataclasses.replace(
        config.sites,
        replication=config.sites.sites,
        placement="cyclic",
        placement_by=None,
        placement_file=None,
        reshuffle_rounds=0,
        stale_experts=0,
        stale_by=None,
    )
    return dataclasses.replace(config, sites=sites)


# ----------------------------------------------------------------------------------------- bytes


def bucket_bytes(config: TrainConfig) -> int:
    """The size of a job's buckets in bytes of fp32: as given, or as `OuterSync` chooses it."""
    outer = config.outer
    if outer.bucket_bytes:
        return outer.bucket_bytes
    codecs = buckets.codecs_of(outer.optimizer, outer.codec, outer.resolved_moment_codecs)
    trained = sizes_of(config.model).counts.total
    return buckets.chosen_bytes(trained, codecs, outer.in_flight, outer.fragments)


def model_sizes(model: ModelConfig | ModelSizes) -> wire.Sizes:
    """Elements outside of the blocks with experts, of such a block, of an expert and of a router
    row."""
    sizes = sizes_of(model)
    outside = sizes.counts.dense - sizes.num_layers * sizes.block
    return wire.Sizes(outside, sizes.block, sizes.expert, sizes.router_row)


def site_elements(
    config: TrainConfig, placement: Placement, site: int
) -> tuple[wire.GroupElements, ...]:
    """Elements that a site has in common with each owner group, by fragment."""
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
    """Bytes that a site sends in a round: in its meetings (ddp: in all steps) and in notes before.

    `round_index` counts from 1. It matters for moment_periods, stale_period and expert_turns.
    """
    experts = placement.num_layers * placement.num_experts
    besides = (placement.num_sites - 1) * NOTE_BYTES
    if stale.is_due(round_index, config.outer.stale_period):
        besides += copied_bytes(config, placement, site)
    return besides + wire.round_bytes(
        site_elements(config, placement, site),
        placement.num_sites,
        optimizer=config.outer.optimizer,
        codec=config.outer.codec,
        bucket_bytes=bucket_bytes(config),
        local_steps=config.run.local_steps,
        clip=config.inner.grad_clip > 0,
        round_index=round_index,
        moment_periods=config.outer.moment_periods,
        moment_codecs=config.outer.resolved_moment_codecs,
        counted_experts=experts if config.outer.counts_tokens else 0,
        numbers=wire.site_numbers(
            config.inner.uneven_steps, config.outer.clip_delta, config.outer.overlap
        ),
        staged=config.fault.tolerant,
        expert_turns=config.outer.expert_turns,
    )


def copied_bytes(config: TrainConfig, placement: Placement, site: int) -> int:
    """Bytes that a site sends to refresh the frozen copies of its experts at other sites."""
    count, expert = copies_per_layer(config), sizes_of(config.model).expert
    if not count:
        return 0
    if placement.replication == 1 and count == placement.num_experts - placement.experts_per_site:
        # The only holder of each expert sends it to all other sites.
        sends = (placement.num_sites - 1) * placement.experts_per_site * placement.num_layers
        return sends * stale.copy_bytes(config.outer.stale_codec, expert)
    wanted = wanted_copies(config, placement)
    sizes = [expert] * placement.num_layers
    return stale.refresh_bytes(placement, wanted, site, sizes, config.outer.stale_codec)


def wanted_copies(config: TrainConfig, placement: Placement) -> stale.Wanted:
    """For each layer and site, the absent experts of which the site computes frozen copies.

    A process reads the file of loads once; later changes to it have no effect. Raises ValueError or
    FileNotFoundError for the load of another model.
    """
    sites = config.sites
    load = None if sites.stale_by is None else _stale_load(sites.stale_by, placement)
    return stale.wanted_copies(placement, sites.stale_experts, load)


@lru_cache(maxsize=8)
def _stale_load(path: Path, placement: Placement) -> list[list[float]]:
    return _load_of("stale_by", path, placement)


def copies_per_layer(config: TrainConfig) -> int:
    """Number of experts per layer of which a site computes frozen copies."""
    sites, experts = config.sites, config.model.num_experts
    if sites.stale_experts < 0:
        return experts - experts * sites.replication // sites.sites
    return sites.stale_experts


def stale_share(config: TrainConfig) -> float:
    """Share of a layer's experts, 0..1, of which a site computes frozen copies."""
    return copies_per_layer(config) / config.model.num_experts


def moved_bytes(config: TrainConfig, placement: Placement, new: Placement, site: int) -> int:
    """Bytes that a site sends to change from one placement to another."""
    return wire.reshuffle_bytes(
        placement,
        new,
        site,
        model_sizes(config.model),
        optimizer=config.outer.optimizer,
        router_scope=config.model.router_scope,
        selection_bias=config.model.balance == "bias",
        outer_momentum=config.outer.resolved_momentum > 0,
        inner_moments=2 if config.sites.reshuffle_moments == "carry" else 0,
    )


def shadow_bytes(config: TrainConfig, placement: Placement, site: int) -> int:
    """Bytes that a site sends in a round to refresh shadow copies; 0 without shadow_experts."""
    if not config.fault.shadow_experts:
        return 0
    return wire.shadow_bytes(placement, site, _shadow_elements(config))


def shadow_memory(config: TrainConfig, placement: Placement, site: int) -> int:
    """Bytes of the shadow copies that a site keeps in host memory; 0 without shadow_experts."""
    if not config.fault.shadow_experts:
        return 0
    return wire.shadow_memory(placement, site, _shadow_elements(config))


def _shadow_elements(config: TrainConfig) -> int:
    return wire.shadow_elements(
        model_sizes(config.model),
        router_scope=config.model.router_scope,
        selection_bias=config.model.balance == "bias",
        outer_momentum=config.outer.resolved_momentum > 0,
    )


def full_replica_bytes(config: TrainConfig, rounds: int, first: int = 0) -> int:
    """Bytes that a site would send in rounds `first` + 1 to `rounds` of the same job with all
    experts at every site."""
    replica = full_replica(config)
    placement = job_placement(replica)
    return sum(meeting_bytes(replica, placement, 0, index + 1) for index in range(first, rounds))


def ddp_bytes(config: TrainConfig, steps: int) -> int:
    """Bytes that a site would send in `steps` steps of plain DDP: all gradients in fp32, in every
    step."""
    total = sizes_of(config.model).counts.total
    sites, bucket = config.sites.sites, bucket_bytes(config)
    return steps * wire.all_reduce_bytes(total, sites, "fp32", bucket)
