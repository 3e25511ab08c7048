"""What a checkpoint of a job takes on disk: the cost model's part on it. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan.memory import FLOAT_BYTES, job_memory
from fomoe_ext.plan.sizes import sizes_of


class CheckpointSize(NamedTuple):
    """Bytes of a checkpoint's tensors by kind, of all sites together.

    model: of all sites, every expert once; it is the anchor, too. outer_state: outer momentum, once
    for all sites. inner_state: moments, of every site its own, as sites train on different data.
    error_feedback: of every site its own. own_models: of every site its parameters, where they
    differ from the model (with fragments, overlap or expert_turns).
    """

    model: int
    inner_state: int
    outer_state: int
    error_feedback: int
    own_models: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def checkpoint_size(config: TrainConfig, placement: Placement) -> CheckpointSize:
    """What the checkpoint of a job takes at the end of a round.

    Frozen copies of experts are not in it where they are those of the last meeting.
    """
    sites = [job_memory(config, placement, site) for site in range(placement.num_sites)]
    model = FLOAT_BYTES * sizes_of(config.model).counts.total
    momentum = config.outer.resolved_momentum > 0 and config.outer.optimizer != "ddp"
    return CheckpointSize(
        model=model,
        inner_state=sum(site.inner_state for site in sites),
        outer_state=model if momentum else 0,
        error_feedback=sum(site.error_feedback for site in sites),
        own_models=sum(site.parameters for site in sites) if config.outer.apart else 0,
    )
