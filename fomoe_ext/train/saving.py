"""The checkpoints of a job: started, copied and written during training; waits are counted."""

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
    """A training rank that can prepare for a checkpoint, with a tally that counts it."""

    tally: Tally

    def finish(self) -> None:
        """Waits for exchanges that overlap local steps and applies them; a collective."""
        ...

    def global_model(self) -> AbstractContextManager[dict[str, Tensor] | None]:
        """Inside, the model is that of the last meeting. Yields the site's own parameters if they
        differ from it, else None."""
        ...


class Checkpoints:
    """Starts the checkpoints of a training rank, one at a time, as all ranks of all sites do.

    Its tally counts the checkpoints and the seconds that training waited for them.
    """

    def __init__(
        self,
        training: SavedRank,
        writer: CheckpointWriter,
        local_steps: int,
        meta: Mapping[str, Any],
    ) -> None:
        """`local_steps`: of a round. `meta`: options of the job for the manifest."""
        self._training, self._writer = training, writer
        self._local_steps, self._meta = local_steps, meta

    def save(self, steps: int) -> Outcome:
        """Writes a checkpoint together with all processes and waits for it; `steps` as in `start`.

        The tally does not count it: it is the last one, at which the job ends or stops.
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
        """Starts a checkpoint together with all sites; `steps`: the most steps any site has taken.

        With `copy` it is written during training, and `poll` tells when it is complete. If copying
        needs no other process, it too happens during training: call `wait_copied` before anything
        changes that the checkpoint holds. The checkpoint before must have ended.

        The global model is that of the last meeting. If a site's own parameters may differ from it
        (in the middle of a round, or with fragments, overlap or expert_turns), the site's state
        holds them as well. Exchanges that overlap local steps are completed first.
        """
        training = self._training
        training.finish()
        with self._counted(), training.global_model() as local:
            if local is None and steps > training.sync.round * self._local_steps:
                # Other sites are in the middle of the round. The global model takes selection
                # biases from them, which have changed since the meeting.
                here = local_tensors(training.model)
                local = {name: value.clone() for name, value in here.items()}
            # Without copying, the model must not change until everything is written.
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
            # Not with several ranks, which gather shards (a collective), and not if the global
            # model is in place only inside `global_model`.
            beside=copy and local is None and ranks.size == 1,
        )

    def wait_copied(self) -> None:
        """Waits until the current checkpoint is copied; call it before its tensors change."""
        with self._counted():
            if (pending := self._writer.pending) is not None:
                pending.copied.wait()

    def poll(self, wait: bool = False) -> Outcome | None:
        """The outcome of the current checkpoint, or None while it is not complete or there is none.

        A collective; quick unless `wait` is set, which waits for the end.
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
        """Abandons the current checkpoint, if there is one, because a site is lost."""
        if (pending := self._writer.pending) is not None:
            pending.abandon()

    def _with_others(self) -> AbstractContextManager[None]:
        return with_others("the checkpoint", self._training.sync.site)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts the time inside as waiting for checkpoints."""
        start = time.perf_counter()
        yield
        self._training.tally.checkpoint_s += time.perf_counter() - start
