"""A site of a job: its state and the parts that train it.

If a site has several ranks, each process has its own `TrainingSite`. The ranks split the batch,
share the experts over the mesh and shard the other parameters by FSDP. All make the same calls, and
the first rank sends for the site.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from fomoe_ext.checkpoint.reader import GlobalModelReader, load_tensors
from fomoe_ext.checkpoint.resume import Resumed, fill_copies, load_into
from fomoe_ext.checkpoint.writer import CheckpointWriter
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data.sequences import TextData
from fomoe_ext.launch.world import World
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer.groups import SiteGroups
from fomoe_ext.outer.reports import RoundReport
from fomoe_ext.outer.sync import OuterSync
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import traffic as plan
from fomoe_ext.report.runs import CHECKPOINTS
from fomoe_ext.train.job import find_state, job_identity
from fomoe_ext.train.local_steps import LocalSteps
from fomoe_ext.train.making import connect, make_site_mesh, make_training
from fomoe_ext.train.meeting import Meetings
from fomoe_ext.train.notes import Notes
from fomoe_ext.train.saving import Checkpoints
from fomoe_ext.train.state import SiteState


class TrainingSite(SiteState):
    """One rank of a site of a job, from the start or a checkpoint to the report."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        data: TextData,
        device: torch.device,
        resume: Path | None,
        late: bool = False,
    ) -> None:
        """A collective. `config`: resolved. `resume`: a checkpoint. `late`: the site joins a
        running job, and `fomoe_ext.fault.reform` makes its model later.

        Raises CheckpointError for a checkpoint of another job.
        """
        super().__init__(config, world, data, device, late)
        resumed = None if resume is None else find_state(resume, config, world.site)
        self.mesh = make_site_mesh(config, world, device)
        if not late:
            placement = plan.job_placement(config) if resumed is None else resumed.placement
            groups = self.make_groups(world)
            self.model, self.optimizer, self.sync = self.make(world, placement, groups, resume)
        self.checkpoints = Checkpoints(
            self,
            CheckpointWriter(self.run_dir / CHECKPOINTS, config.run.keep_checkpoints),
            self.local_steps,
            job_identity(config) | {"tokenizer": data.tokenizer},
        )
        self.steps = LocalSteps(self, before_update=self.checkpoints.wait_copied)
        self.notes = Notes(self)
        self.meetings = Meetings(self, before_change=self.checkpoints.wait_copied)
        self.remarks: list[str] = []
        """Lines for the user about the checkpoint that was resumed."""
        if resumed is not None:
            assert resume is not None
            self._load(resumed, resume)

    def make_groups(self, world: World) -> SiteGroups:
        """The process groups of the sites; a collective."""
        return connect(self.config, world)

    def make(
        self,
        world: World,
        placement: Placement,
        groups: SiteGroups,
        resume: Path | None = None,
        arriving: bool = False,
    ) -> tuple[LanguageModel, torch.optim.Optimizer, OuterSync]:
        """Model, optimizer and outer sync, from `make_training`; a collective."""
        return make_training(
            self.config, world, placement, groups, self.device, self.mesh, resume, arriving
        )

    def _load(self, resumed: Resumed, path: Path) -> None:
        """Loads the training state of a checkpoint; its weights have been loaded."""
        load_into(self, resumed, partial(load_tensors, path))
        if self.sync.copies is not None:
            with GlobalModelReader(path) as reader:
                fill_copies(self, resumed, reader.tensor)
        if not resumed.same:
            self.remarks.append(
                f"counts start from zero: the checkpoint has {resumed.num_sites} sites or another "
                "placement"
            )
        self._before_s = self.tally.wall_s

    def after_meeting(self, placement: Placement, outcome: RoundReport) -> float:
        """Counts an interrupted meeting that was then applied; returns the seconds it took."""
        return self.meetings.count(placement, outcome)

    def finish(self) -> None:
        """Waits for exchanges that overlap local steps and applies them; a collective."""
        self.meetings.finish()
