"""The size of a job's checkpoints on disk. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.placement import wire
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan.memory import FLOAT_BYTES, feeds_back, job_memory
from fomoe_ext.plan.sizes import sizes_of
from fomoe_ext.plan.traffic import bucket_bytes, site_elements
from fomoe_ext.report.units import human_bytes


class CheckpointSize(NamedTuple):
    """Bytes of a checkpoint's tensors by kind, for all sites together.

    model: every parameter once, with selection biases; the anchor is restored from it. inner_state:
    the moments of each site, since sites train on different data. outer_state: outer momentum, once
    for all sites. error_feedback: of each site, for the deltas that it sends and the sums that it
    encodes. own_models: the parameters of each site, if they differ from the model (with fragments,
    overlap or expert_turns).
    """

    model: int
    inner_state: int
    outer_state: int
    error_feedback: int
    own_models: int

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self)


def checkpoint_size(config: TrainConfig, placement: Placement) -> CheckpointSize:
    """The size of a job's checkpoint at the end of a round.

    Frozen copies of experts are not counted: a checkpoint does not store those of the last meeting.
    """
    sites = [job_memory(config, placement, site) for site in range(placement.num_sites)]
    sizes = sizes_of(config.model)
    trained = FLOAT_BYTES * sizes.counts.total
    biases = FLOAT_BYTES * sizes.num_layers * sizes.num_experts
    momentum = config.outer.resolved_momentum > 0 and config.outer.optimizer != "ddp"
    own = sum(site.parameters + biases for site in sites)
    return CheckpointSize(
        model=trained + biases,
        inner_state=sum(site.inner_state for site in sites),
        outer_state=trained if momentum else 0,
        error_feedback=FLOAT_BYTES * sum(_errors(config, placement, s) for s in range(len(sites))),
        own_models=own if config.outer.apart else 0,
    )


def _errors(config: TrainConfig, placement: Placement, site: int) -> int:
    """Elements of a site's stored error feedback, which includes zeros for experts that no other
    site holds."""
    if not feeds_back(config):
        return 0
    codec, bucket = config.outer.codec, bucket_bytes(config)
    return sum(
        numel + (wire.own_elements(numel, len(owners), codec, bucket) if len(owners) > 1 else 0)
        for fragment in site_elements(config, placement, site)
        for owners, numel in fragment.parameters.items()
    )


def described(size: CheckpointSize) -> str:
    """A line with the size of a checkpoint and the sizes of its parts."""
    parts = [
        f"{name.replace('_', ' ')} {human_bytes(count)}"
        for name, count in size._asdict().items()
        if count
    ]
    return f"a checkpoint takes {human_bytes(size.total)}: {', '.join(parts)}"
