"""The loop of a site, round by round: local steps, a note to all others, the meeting; then
validation and a checkpoint where they are due.

When a site was asked to stop, a round ends in a checkpoint, without the meeting where not all steps
were taken. Every site counts what it does (`fomoe_ext.report.tally`); one speaks.
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
"""The last validation uses so many times the tokens of those before it."""


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
        """`company`: the others, where sites come and go. `start`: what is told of the beginning;
        `unwritten` has what could not be written."""
        self.site, self.stop, self.company = site, stop, company
        self.unwritten = unwritten or Unwritten()
        self.speaker = Speaker(site, start, self.unwritten)
        self.run = site.config.run
        self._renew, self._came = False, False
        self._due_at_end = False
        """Whether the last checkpoint is still to be written."""
        self._unsaved = False
        """Whether the last one that was waited for could not be."""

    def run_to_end(self) -> int:
        """What is left of the job, and its report; the exit code."""
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
        """Whether what could not be written is to be the exit code. A job that was stopped says so,
        unless it has no checkpoint to go on from."""
        return self._unsaved if code == EXIT_STOPPED else bool(self.unwritten.entries())

    def train(self) -> bool:
        """All rounds that are left; True when the job was stopped (a checkpoint is written)."""
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
        """The last checkpoint, the last validation and the report."""
        while True:
            try:
                return self._finish()
            except (PeerLost, MeetingLost) as error:
                self._recover(error)

    # ------------------------------------------------------------------------------------ a round

    def _round(self) -> bool:
        """One round; True when it ended in a checkpoint because a site was asked to stop."""
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
        """The notes of all sites; who does not come in time may be gone on without."""
        if self.company is None:
            return self.site.notes.exchange(self.stop.asked)
        inject.point("notes")
        with self.company.patience():
            notes = self.site.notes.exchange(self.stop.asked, self.company.membership.knocked())
        self._renew = any(note.knocks for note in notes)
        return notes

    def _after_round(self) -> None:
        """What is due after a round."""
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
        # Who leaves before all have what they need would be missed by the others.
        lost = gather(self.unwritten.entries(), site.world, "the end")
        if self.company is not None:
            self.company.membership.finish()
        self.speaker.end(report)
        self.speaker.lost(lost)

    # ------------------------------------------------------------------------------- other sites

    def _recover(self, error: Exception) -> None:
        """Goes on with the sites that are left; raises the error where the job cannot."""
        if self.company is None:
            raise error
        self._renew = False
        self.company_changed(self.company.recover(str(error)))

    def company_changed(self, event: dict[str, Any]) -> None:
        """The sites are others than before (`Company.recover`)."""
        # Who has come joins in with what the others do next, between two rounds.
        self._came = self.site.world.number in event["joined"]
        if self.site.world.process == 0:
            if not self.speaker.speaks:
                self.speaker.open(at_start=False)
            self.speaker.sites(event)
        else:
            self.speaker.close()

    # -------------------------------------------------------------------------------- checkpoints

    def _save(self, steps: int) -> None:
        """A checkpoint that is waited for; where it cannot be written that is told."""
        self.speaker.saved(self.site.checkpoints.poll(wait=True))
        outcome = self.site.checkpoints.save(steps)
        self._unsaved = bool(outcome.error)
        self.speaker.saved(outcome, "")

    def _start_save_if_due(self) -> None:
        """A checkpoint during the training, which goes on where it cannot be written."""
        every, site = self.run.checkpoint_rounds, self.site
        if not (every and site.round and site.round % every == 0):
            return
        checkpoints, behind = site.checkpoints, self.run.async_checkpoints
        self.speaker.saved(checkpoints.poll(wait=True))  # of the one before, if that still lasts
        checkpoints.start(site.step, copy=behind)
        if not behind:
            self.speaker.saved(checkpoints.poll(wait=True))
