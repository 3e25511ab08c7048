"""The training loop of a site. A round is: local steps, the exchange of notes, the meeting, then
validation and a checkpoint if they are due.

If any site was asked to stop, the round ends in a checkpoint; the meeting is skipped if not all
steps were taken. Every site counts what it does (`fomoe_ext.report.tally`); one process speaks.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fomoe_ext.fault.company import Company
from fomoe_ext.files.unwritten import EXIT_UNWRITTEN, Unwritten
from fomoe_ext.launch import inject
from fomoe_ext.launch.processes import EXIT_STOPPED
from fomoe_ext.launch.world import PeerLost, StopRequest
from fomoe_ext.model.evaluate import Validation
from fomoe_ext.outer.errors import MeetingLost
from fomoe_ext.plan import traffic as plan
from fomoe_ext.plan.traffic import RoundNote
from fomoe_ext.train.job_report import job_report
from fomoe_ext.train.site import TrainingSite
from fomoe_ext.train.speaker import Speaker
from fomoe_ext.train.start import Start, gather
from fomoe_ext.train.validation import validate

_FINAL_EVAL = 8
"""The last validation uses this many times the tokens of earlier ones."""


class Trainer:
    """The rounds of a site, to the end of the job."""

    def __init__(
        self,
        site: TrainingSite,
        stop: StopRequest,
        company: Company | None = None,
        start: Start | None = None,
        unwritten: Unwritten | None = None,
    ) -> None:
        """`company`: for jobs that continue when sites are lost. `start`: for the first lines of
        the log. `unwritten` collects files that could not be written."""
        self.site, self.stop, self.company = site, stop, company
        self.unwritten = unwritten or Unwritten()
        self.speaker = Speaker(site, start, self.unwritten)
        self.run = site.config.run
        self._renew, self._came = False, False
        self._due_at_end = False
        """The last checkpoint is still to be written."""
        self._unsaved = False
        """The last checkpoint that was waited for could not be written."""

    def run_to_end(self) -> int:
        """Trains the remaining rounds and writes the report; returns the exit code."""
        try:
            code = 0
            self.site.count_startup()
            if self.train():
                code = EXIT_STOPPED
                self.speaker.lost([[] for _ in range(self.site.world.processes)])
            else:
                self.finish()
        finally:
            self.speaker.close()
        return EXIT_UNWRITTEN if self._lost_work(code) else code

    def _lost_work(self, code: int) -> bool:
        """Whether the exit code is to say that files could not be written. A stopped job keeps its
        own exit code unless the checkpoint to resume is missing."""
        return self._unsaved if code == EXIT_STOPPED else bool(self.unwritten.entries())

    def train(self) -> bool:
        """Trains the remaining rounds; True if the job was stopped (after a checkpoint)."""
        while self.site.round < self.site.rounds:
            try:
                if self._came:
                    self._came = False
                    self._start_save_if_due()
                if self._round():
                    return True
                self._after_round()
            except (PeerLost, MeetingLost) as error:
                self._recover(error)
        return False

    def finish(self) -> None:
        """Writes the last checkpoint, validates and writes the report."""
        while True:
            try:
                return self._finish()
            except (PeerLost, MeetingLost) as error:
                self._recover(error)

    # ------------------------------------------------------------------------------------ a round

    def _round(self) -> bool:
        """One round; True if it ended in a checkpoint because a site was asked to stop."""
        site, tally, start = self.site, self.site.tally, time.perf_counter()
        tokens, sent, exchange_s = tally.tokens, site.bytes_sent, tally.exchange_s
        inject.in_round(site.round + 1)

        def after_step(loss: Tensor) -> None:
            self.speaker.step(loss, tally.tokens - tokens, start)

        site.steps.take(self.stop, after_step)
        before_notes = time.perf_counter()
        tally.local_s += before_notes - start
        notes = self._exchange_notes()
        waited = time.perf_counter() - before_notes
        stopping = any(note.stop for note in notes)
        if stopping and any(note.left for note in notes):
            tally.meeting_s += waited
            if site.world.rank == 0:
                tally.planned_bytes += (site.world.num_sites - 1) * plan.NOTE_BYTES
            self._save(int(max(note.steps for note in notes)))
            return True
        validated = tally.validation_s
        meeting = waited + site.meetings.meet()
        wall = time.perf_counter() - start - (tally.validation_s - validated)
        tally.local_s += wall - meeting - (before_notes - start)
        tally.meeting_s += meeting
        self.speaker.round(
            notes,
            tokens=tally.tokens - tokens,
            sent=int(site.sync.ranks.sum_(torch.tensor(site.bytes_sent - sent))),
            wall_s=wall,
            meeting_s=meeting,
            exchange_s=tally.exchange_s - exchange_s,
        )
        if stopping:
            self._save(site.step)
        return stopping

    def _exchange_notes(self) -> list[RoundNote]:
        """The notes of all sites. With a `company`, a site that is late is left behind."""
        if self.company is None:
            return self.site.notes.exchange(self.stop.asked)
        inject.point("notes")
        with self.company.patience():
            notes = self.site.notes.exchange(self.stop.asked, self.company.membership.knocked())
        self._renew = any(note.knocks for note in notes)
        return notes

    def _after_round(self) -> None:
        """Validation, changes of the sites and a checkpoint, whichever are due."""
        site = self.site
        self.speaker.saved(site.checkpoints.poll())
        if site.round == site.rounds:
            self._due_at_end = True
            return
        if self.run.eval_rounds and site.round % self.run.eval_rounds == 0:
            self._validate(self.run.eval_tokens)
        if self.company is not None and (self._renew or not self.company.is_level()):
            self._renew = False
            self.company_changed(self.company.renew())
        self._start_save_if_due()

    def _validate(self, max_tokens: int) -> Validation:
        result = validate(self.site, max_tokens)
        self.speaker.validation(result)
        return result

    def _finish(self) -> None:
        site = self.site
        if self._due_at_end:
            self._save(site.step)
        site.finish()
        validation = self._validate(_FINAL_EVAL * self.run.eval_tokens)
        report = job_report(site, validation)
        self.speaker.write(report)
        # No process may leave before all have received what they need from it.
        lost = gather(self.unwritten.entries(), site.world, "the end")
        if self.company is not None:
            self.company.membership.finish()
        self.speaker.end(report)
        self.speaker.lost(lost)

    # ------------------------------------------------------------------------------- other sites

    def _recover(self, error: Exception) -> None:
        """Continues with the remaining sites; raises `error` in a job that cannot."""
        if self.company is None:
            raise error
        self._renew = False
        self.company_changed(self.company.recover(str(error)))

    def company_changed(self, event: dict[str, Any]) -> None:
        """Reacts to lost or new sites. `event`: from `Company.recover`, `renew` or `join`."""
        # A new site takes part in what the others do next between two rounds: a checkpoint.
        self._came = self.site.world.number in event["joined"]
        if self.site.world.process == 0:
            if not self.speaker.speaks:
                self.speaker.open(at_start=False)
            self.speaker.sites(event)
        else:
            self.speaker.close()

    # -------------------------------------------------------------------------------- checkpoints

    def _save(self, steps: int) -> None:
        """Writes a checkpoint and waits for it. A failure is reported."""
        self.speaker.saved(self.site.checkpoints.poll(wait=True))
        outcome = self.site.checkpoints.save(steps)
        self._unsaved = bool(outcome.error)
        self.speaker.saved(outcome, "")

    def _start_save_if_due(self) -> None:
        """Starts a checkpoint if one is due. A failed one is reported and training continues."""
        every, site = self.run.checkpoint_rounds, self.site
        if not (every and site.round and site.round % every == 0):
            return
        checkpoints, behind = site.checkpoints, self.run.async_checkpoints
        self.speaker.saved(checkpoints.poll(wait=True))  # the one before, if it is not complete
        checkpoints.start(site.step, copy=behind)
        if not behind:
            self.speaker.saved(checkpoints.poll(wait=True))
