"""A site of a job: what it has, and the parts that train with it.

With several ranks a site's batch is shared among them, experts by the mesh and all else by FSDP;
this is then one rank, all of a site go through the same calls, and the first speaks for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.resume import Resumed, fill_copies, load_into, state_of, tensors_of
from fomoe_ext.checkpoint.writer import CheckpointWriter, Outcome
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.data.sequences import TextData
from fomoe_ext.launch.world import World, with_others
from fomoe_ext.layer.assemble import local_tensors, own_global_tensors
from fomoe_ext.model.evaluate import Validation
from fomoe_ext.model.language import LanguageModel
from fomoe_ext.outer import OuterSync, RoundReport, SiteGroups
from fomoe_ext.placement.placement import Placement
from fomoe_ext.plan import traffic as plan
from fomoe_ext.report.runs import CHECKPOINTS
from fomoe_ext.train.job import find_state, job_identity
from fomoe_ext.train.local_steps import LocalSteps
from fomoe_ext.train.making import connect, make_site_mesh, make_training
from fomoe_ext.train.meeting import Meetings
from fomoe_ext.train.notes import Notes
from fomoe_ext.train.state import SiteState
from fomoe_ext.train.validation import validate


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
        self.steps = LocalSteps(self, before_update=self._settle_save)
        self.notes = Notes(self)
        self.meetings = Meetings(self, before_change=self._settle_save)
        self.remarks: list[str] = []
        """What the user is to be told of the checkpoint that it goes on from."""
        if resumed is not None:
            assert resume is not None
            self._load(resumed, resume)
        self.checkpoints = CheckpointWriter(self.run_dir / CHECKPOINTS, config.run.keep_checkpoints)
        """Writes this job's checkpoints; see `start_save`."""

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
        load_into(self, resumed, partial(ckpt.load_tensors, path))
        if self.sync.copies is not None:
            with ckpt.GlobalModelReader(path) as reader:
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

    @torch.no_grad()
    def validate(self, max_tokens: int) -> Validation:
        """Validation of the global model, counted; a collective."""
        with self._global_model():
            return validate(self, max_tokens)

    @contextmanager
    def _global_model(self) -> Iterator[dict[str, Tensor] | None]:
        """Inside, the model is that of the last meeting; gives this site's where that differs."""
        if not (self.steps_in_round or self.config.outer.apart):
            yield None
            return
        local = {name: value.clone() for name, value in local_tensors(self.model).items()}
        self.sync.copy_anchor_to_model()
        yield local
        self._restore(local)

    # ------------------------------------------------------------------------------ checkpoints

    def save(self, steps: int) -> Path:
        """`try_save`, which raises CheckpointError on all sites when it cannot be written."""
        outcome = self.try_save(steps)
        if outcome.error:
            raise ckpt.CheckpointError(
                f"could not write checkpoint {outcome.path}: {outcome.error}"
            )
        return outcome.path

    def try_save(self, steps: int) -> Outcome:
        """Writes a checkpoint with all others and waits for it; `steps` as for `start_save`."""
        waited = self.tally.checkpoint_s
        self.start_save(steps, copy=False)
        with with_others("the checkpoint", self.world.site):
            outcome = self.checkpoints.finish()
        self.tally.checkpoint_s = waited  # with this one the job ends or stops
        assert outcome is not None
        self.tally.checkpoints_failed += bool(outcome.error)
        return outcome

    @torch.no_grad()
    def start_save(self, steps: int, copy: bool = True) -> None:
        """Begins a checkpoint with all other sites; `steps` is the most that a site has taken.

        With `copy` it is written while training goes on, and `poll_save` tells when it is there.
        Where that needs no other process it is copied while training goes on as well, until the
        next backward pass at the latest. The one before must have ended. The global model is that
        of the last meeting; where a site's own may differ (in the middle of a round, with
        fragments, overlap or expert_turns) its state holds that too. Fragments under way are taken
        in before.
        """
        self.finish()
        start = time.perf_counter()
        with self._global_model() as local:
            if local is None and steps > self.round * self.local_steps:
                # Others are in the middle of the round, and some of the global model is from them:
                # selection biases, which have moved on there.
                local = {name: value.clone() for name, value in local_tensors(self.model).items()}
            # Without copying, the model must stay as it is until all is written.
            self._start_save(steps, local, copy or local is not None)
        self.tally.checkpoint_s += time.perf_counter() - start

    def _start_save(self, steps: int, local: dict[str, Tensor] | None, copy: bool) -> None:
        self.tally.wall_s = self._before_s + time.perf_counter() - self.started
        with with_others("the checkpoint", self.world.site):
            ranks = self.sync.ranks
            self.checkpoints.start(
                ckpt.checkpoint_name(steps),
                own_global_tensors(
                    self.model, self.placement, self.world.site, local_tensors(self.model), ranks
                ),
                state_of(self, local is not None),
                site=self.world.site,
                num_sites=self.world.num_sites,
                rank=ranks.rank,
                ranks_per_site=ranks.size,
                round=self.round,
                meta=job_identity(self.config) | {"tokenizer": self.data.tokenizer},
                named=tensors_of(self, local),
                copy=copy,
                # Several ranks put together what is sharded, and a global model of the site's own
                # making is about to go.
                beside=copy and local is None and ranks.size == 1,
            )

    def _settle_save(self) -> None:
        """Waits until all of a checkpoint is copied, before it changes."""
        start = time.perf_counter()
        self.checkpoints.settle()
        self.tally.checkpoint_s += time.perf_counter() - start

    def poll_save(self, wait: bool = False) -> Outcome | None:
        """How the checkpoint under way has ended, if it has; all sites must ask.

        Quick, unless it is to `wait` for the end. None where there is none under way.
        """
        if not self.checkpoints.under_way:
            return None
        start = time.perf_counter()
        with with_others("the checkpoint", self.world.site):
            outcome = self.checkpoints.finish() if wait else self.checkpoints.poll()
        self.tally.checkpoint_s += time.perf_counter() - start
        if outcome is not None:
            self.tally.checkpoints += 1
            self.tally.checkpoints_failed += bool(outcome.error)
        return outcome

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name, target in local_tensors(self.model).items():
            target.copy_(tensors[name])
