"""What a site has while it trains: what its parts work on, what a checkpoint keeps of it, and what
becomes another when sites come or go.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data.sequences import BatchIterator, TextData
from fomoe_ext.fault.shadows import Shadows
from fomoe_ext.launch.world import World
from fomoe_ext.layer.assemble import local_tensors
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer import OuterSync
from fomoe_ext.placement.placement import Placement
from fomoe_ext.report.tally import Tally
from fomoe_ext.train.pace import Pace
from fomoe_ext.train.round_progress import RoundProgress


class SiteState:
    """The state of one rank of a site. Whoever makes it adds mesh, model, optimizer and sync."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        data: TextData,
        device: torch.device,
        late: bool = False,
    ) -> None:
        """`config` is resolved."""
        self.started, self._before_s = time.perf_counter(), 0.0
        """_before_s: seconds of the job before it was resumed."""
        self.config, self.world, self.data, self.device = config, world, data, device
        self.late = late
        """Whether this site knows nothing of the model yet, or not enough."""
        self.mesh: DeviceMesh | None = None
        """Of a site with several ranks."""
        self.run_dir = config.run.run_dir or Path(".")
        self.rounds, self.local_steps = config.run.resolved_rounds, config.run.local_steps
        self.model: LanguageModel
        self.optimizer: torch.optim.Optimizer
        self.sync: OuterSync
        self.batches: BatchIterator = data.train_batches(
            world.number, config.sites.sites, config.inner.batch_size, config.run.seed
        )
        self.tally = Tally()
        self.progress, self.pace = RoundProgress(self.local_steps, device), Pace()
        self.shadows = Shadows()
        self.story: list[dict[str, Any]] = []
        """What happened to the sites, for the report."""
        self.routing: dict[str, Any] | None = None
        """`routing_probe.figures` of the last meeting, where there is a probe."""

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.sync.round

    @property
    def step(self) -> int:
        """Local steps of all rounds so far, with its own of the one under way: the same at all
        sites between rounds, also where some have taken fewer."""
        return self.round * self.local_steps + self.progress.steps

    @property
    def steps_in_round(self) -> int:
        """Local steps of the round under way."""
        return self.progress.steps

    @steps_in_round.setter
    def steps_in_round(self, steps: int) -> None:
        self.progress.steps = steps

    @property
    def step_s(self) -> float:
        """Seconds of a local step, the newest measured the most; 0 = not known yet."""
        return self.pace.seconds

    @property
    def bytes_sent(self) -> int:
        """Bytes this process has sent so far to other sites in meetings, for moved experts and in
        notes."""
        return self.sync.bytes_sent + self.tally.note_bytes

    @property
    def link(self) -> str:
        """The link that meetings go over, in words."""
        return self.sync.groups.link_words

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.sync.placement

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that the model computes in; None = that of its parameters."""
        return torch.bfloat16 if self.config.run.dtype == "bfloat16" else None

    def local_tensors(self) -> dict[str, Tensor]:
        """This rank's parameters and persistent buffers by name."""
        return local_tensors(self.model)

    def count_wall(self) -> None:
        """Brings the tally's seconds since the job began up to now."""
        self.tally.wall_s = self._before_s + time.perf_counter() - self.started

    # ------------------------------------------------------------- of the round, for a checkpoint

    def round_counts(self) -> tuple[float, int, int]:
        """Sum of this rank's losses, rows and slots of the round so far."""
        return self.progress.counts()

    def set_round_counts(self, counts: tuple[float, int, int]) -> None:
        """Goes on from what `round_counts` said."""
        self.progress.set_counts(counts)

    def uneven_state(self) -> dict[str, float]:
        """What of its steps is this site's own: those due, tokens of the round, the pace."""
        return {
            "due": self.progress.due,
            "tokens": self.progress.tokens * self.world.ranks,
            "pace": self.pace.seconds,
        }

    def set_uneven_state(self, state: Mapping[str, float]) -> None:
        """Goes on from what `uneven_state` said. Raises ValueError for steps that no site takes."""
        due = int(state["due"])
        if not 1 <= due <= self.local_steps:
            raise ValueError(f"steps due must be in [1, {self.local_steps}], got {due}")
        if self.config.inner.uneven_steps:
            self.progress.set_due(due)
        self.progress.tokens = int(state["tokens"]) // self.world.ranks
        self.pace = Pace(float(state["pace"]))
