"""The checkpoints of a job: begun, copied and written while it trains, and what the waits cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fomoe_ext.checkpoint.manifest import Process, checkpoint_name
from fomoe_ext.checkpoint.pending import Outcome, PendingCheckpoint
from fomoe_ext.checkpoint.state import TrainingRank, state_of, tensors_of
from fomoe_ext.checkpoint.writer import CheckpointWriter
from fomoe_ext.launch.world import with_others
from fomoe_ext.layer.assemble import local_tensors, own_global_tensors
from fomoe_ext.report.tally import Tally


class SavedRank(TrainingRank, Protocol):
    """A training rank whose checkpoints are counted, and which can be made ready for one."""

    tally: Tally

    def finish(self) -> None:
        """Takes in what is under way; a collective."""
        ...

    def global_model(self) -> AbstractContextManager[dict[str, Tensor] | None]:
        """Inside, the model is that of the last meeting; gives this site's where that differs."""
        ...


class Checkpoints:
    """Begins the checkpoints of a training rank, one at a time; all ranks of all sites do.

    Counts in its tally how many there were and how long training waited for them.
    """

    def __init__(
        self,
        training: SavedRank,
        writer: CheckpointWriter,
        local_steps: int,
        meta: Mapping[str, Any],
    ) -> None:
        """`local_steps`: of a round. `meta`: what the manifest says of the job."""
        self._training, self._writer = training, writer
        self._local_steps, self._meta = local_steps, meta

    def save(self, steps: int) -> Outcome:
        """Writes a checkpoint with all others and waits for it; `steps` as for `start`.

        It is not counted as one of the training: with it the job ends or stops.
        """
        waited = self._training.tally.checkpoint_s
        pending = self.start(steps, copy=False)
        with self._with_others():
            outcome = pending.wait()
        self._training.tally.checkpoint_s = waited
        assert outcome is not None
        self._training.tally.checkpoints_failed += bool(outcome.error)
        return outcome

    @torch.no_grad()
    def start(self, steps: int, copy: bool = True) -> PendingCheckpoint:
        """Begins a checkpoint with all other sites; `steps` is the most that a site has taken.

        With `copy` it is written while training goes on, and `poll` tells when it is there. Where
        that needs no other process it is copied while training goes on as well; before anything
        changes that is in it, `settle` is to be called. The one before must have ended. The global
        model is that of the last meeting; where a site's own may differ (in the middle of a round,
        with fragments, overlap or expert_turns) its state holds that too. Fragments under way are
        taken in before.
        """
        training = self._training
        training.finish()
        with self._counted(), training.global_model() as local:
            if local is None and steps > training.sync.round * self._local_steps:
                # Others are in the middle of the round, and some of the global model is from them:
                # selection biases, which have moved on there.
                here = local_tensors(training.model)
                local = {name: value.clone() for name, value in here.items()}
            # Without copying, the model must stay as it is until all is written.
            with self._with_others():
                return self._start(steps, local, copy or local is not None)

    def _start(self, steps: int, local: dict[str, Tensor] | None, copy: bool) -> PendingCheckpoint:
        training, sync = self._training, self._training.sync
        ranks, placement = sync.ranks, sync.placement
        return self._writer.start(
            checkpoint_name(steps),
            Process(sync.site, placement.num_sites, ranks.rank, ranks.size),
            own_global_tensors(
                training.model, placement, sync.site, local_tensors(training.model), ranks
            ),
            state_of(training, local is not None),
            round=sync.round,
            meta=self._meta,
            named=tensors_of(training, local),
            copy=copy,
            # Several ranks put together what is sharded, and a global model of the site's own
            # making is about to go.
            beside=copy and local is None and ranks.size == 1,
        )

    def settle(self) -> None:
        """Waits until all of a checkpoint is copied, before it changes."""
        with self._counted():
            if (pending := self._writer.pending) is not None:
                pending.copied.wait()

    def poll(self, wait: bool = False) -> Outcome | None:
        """How the checkpoint under way has ended, if it has; all sites must ask.

        Quick, unless it is to `wait` for the end. None where there is none under way.
        """
        pending, tally = self._writer.pending, self._training.tally
        if pending is None:
            return None
        with self._counted(), self._with_others():
            outcome = pending.wait() if wait else pending.poll()
        if outcome is not None:
            tally.checkpoints += 1
            tally.checkpoints_failed += bool(outcome.error)
        return outcome

    def abandon(self) -> None:
        """Gives up the checkpoint under way, if there is one: for when a site is lost."""
        if (pending := self._writer.pending) is not None:
            pending.abandon()

    def _with_others(self) -> AbstractContextManager[None]:
        return with_others("the checkpoint", self._training.sync.site)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """What goes on inside counts as waiting for checkpoints."""
        start = time.perf_counter()
        yield
        self._training.tally.checkpoint_s += time.perf_counter() - start
