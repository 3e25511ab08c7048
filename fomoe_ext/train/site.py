"""A site of a job: what it has, and the parts that train with it.

With several ranks a site's batch is shared among them, experts by the mesh and all else by FSDP;
this is then one rank, all of a site go through the same calls, and the first speaks for it.
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
    """A site of a job (one of its ranks), from its start or from a checkpoint to the report."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        data: TextData,
        device: torch.device,
        resume: Path | None,
        late: bool = False,
    ) -> None:
        """`config` is resolved; `resume` is a checkpoint. All processes must make theirs at once;
        a `late` one has no model before `fomoe_ext.fault.reform` has made one.

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
        self.steps = LocalSteps(self, before_update=self.checkpoints.settle)
        self.notes = Notes(self)
        self.meetings = Meetings(self, before_change=self.checkpoints.settle)
        self.remarks: list[str] = []
        """What the user is to be told of the checkpoint that it goes on from."""
        if resumed is not None:
            assert resume is not None
            self._load(resumed, resume)

    def make_groups(self, world: World) -> SiteGroups:
        """The connections of all sites; a collective."""
        return connect(self.config, world)

    def make(
        self,
        world: World,
        placement: Placement,
        groups: SiteGroups,
        resume: Path | None = None,
        arriving: bool = False,
    ) -> tuple[LanguageModel, torch.optim.Optimizer, OuterSync]:
        """A model of what the site is to hold, as `make_training`; a collective."""
        return make_training(
            self.config, world, placement, groups, self.device, self.mesh, resume, arriving
        )

    def _load(self, resumed: Resumed, path: Path) -> None:
        """Goes on from a checkpoint, of which the weights have been loaded."""
        load_into(self, resumed, partial(load_tensors, path))
        if self.sync.copies is not None:
            with GlobalModelReader(path) as reader:
                fill_copies(self, resumed, reader.tensor)
        if not resumed.same:
            self.remarks.append(
                f"counts begin anew: the checkpoint is of {resumed.num_sites} sites, or of "
                "another placement"
            )
        self._before_s = self.tally.wall_s

    def after_meeting(self, placement: Placement, outcome: RoundReport) -> float:
        """Counts a meeting that broke off and was settled; returns the seconds it took."""
        return self.meetings.count(placement, outcome)

    def finish(self) -> None:
        """Takes in what is under way, after the last round; a collective."""
        self.meetings.finish()
