"""Reports a job while it runs: metrics files, lines on the terminal, checkpoints.

One process speaks for all. In the others the `Speaker` is not opened and does nothing.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.pending import Outcome
from fomoe_ext.config.changes import told
from fomoe_ext.config.model import count_parameters
from fomoe_ext.files.unwritten import Unwritten, tolerant
from fomoe_ext.launch.console import SIMILAR
from fomoe_ext.launch.processes import CONSOLE_FD
from fomoe_ext.model.evaluate import Validation
from fomoe_ext.plan.disk import checkpoint_size, described
from fomoe_ext.plan.traffic import RoundNote
from fomoe_ext.report.metrics import rewind_metrics
from fomoe_ext.report.page import write_page
from fomoe_ext.report.report import known_course, print_report, write_report
from fomoe_ext.report.run_log import RunLog
from fomoe_ext.report.runs import METRICS
from fomoe_ext.report.story import describe
from fomoe_ext.train.job import learning_rate
from fomoe_ext.train.site import TrainingSite
from fomoe_ext.train.start import Start

_log = logging.getLogger(__name__)


class Speaker:
    """Speaks for all sites of a job, between `open` and `close`."""

    def __init__(self, site: TrainingSite, start: Start | None, unwritten: Unwritten) -> None:
        """`start`: from where the job began; None if that is not to be reported."""
        self._site, self._start, self._unwritten = site, start, unwritten
        self._log: RunLog | None = None
        self._failed: list[Path] = []
        """Checkpoints that could not be written since the last successful one."""
        self._made_up_for: list[str] = []
        """Lines about failed checkpoints that a later one has replaced."""
        self._overlap = ""
        """What was last said of a chosen overlap."""

    @property
    def speaks(self) -> bool:
        """Whether this process speaks for all."""
        return self._log is not None

    def open(self, at_start: bool) -> None:
        """Begins to speak. `at_start`: the job starts or resumes now; else a site takes over from a
        lost one."""
        site, start = self._site, self._start
        run = site.config.run
        if run.resume is not None:
            try:
                rewind_metrics(site.run_dir / METRICS, site.step)
            except OSError as error:
                self._unwritten.note(site.run_dir / METRICS, error, "from before")
        log = RunLog(
            site.run_dir,
            total_rounds=site.rounds,
            local_steps=site.local_steps,
            first_step=site.step,
            tensorboard=run.tensorboard,
            console=_console(self._unwritten),
            unwritten=self._unwritten,
        )
        for line in _about(site):
            log.say(line)
        for remark in [*(() if start is None else start.notes), *site.remarks]:
            log.say(remark)
        if at_start and start is not None and start.resumed is not None:
            _tell_resumed(log, site, start)
        self._log = log.__enter__()

    def close(self) -> None:
        """Closes the log if this process keeps it."""
        log, self._log = self._log, None
        if log is not None:
            log.__exit__(None, None, None)

    # --------------------------------------------------------------------------- while it goes on

    def step(self, loss: Tensor, tokens: int, since: float) -> None:
        """Reports a local step. `tokens`: of this process in the round, which began at `since`."""
        if self._log is not None:
            all_sites = tokens / (time.perf_counter() - since) * self._site.world.processes
            self._log.step(self._site.step, lambda: float(loss), all_sites)

    def round(
        self,
        notes: Sequence[RoundNote],
        *,
        tokens: int,
        sent: int,
        wall_s: float,
        meeting_s: float,
        exchange_s: float,
    ) -> None:
        """Reports a round from the notes of all sites and from this site's counts in the round."""
        if self._log is None:
            return
        site, step = self._site, self._site.step
        slots = sum(note.slots for note in notes)
        # The mean leaves out sites with NaN, as the meeting does.
        losses = [(note.loss, note.taken) for note in notes if math.isfinite(note.loss)]
        taken = sum(note.taken for note in notes)
        per_site = taken / len(notes) / (notes[site.world.site].taken or 1)
        total = site.rounds * site.local_steps
        self._log.round(
            {
                "round": site.round,
                "step": step,
                "loss": sum(loss for loss, _ in losses) / (sum(steps for _, steps in losses) or 1),
                "losses": [note.loss / (note.taken or 1) for note in notes],
                "tokens": round(taken * site.config.inner.batch_size * site.config.model.seq_len),
                "lr": learning_rate(site.config.inner, step - 1, total),
                "tokens_per_s": tokens * per_site * site.world.processes / wall_s,
                "skipped_share": 1 - sum(note.rows for note in notes) / slots,
                "bytes_sent": sent,
                "meeting_s": meeting_s,
                "exchange_s": exchange_s,
                "epoch": site.batches.epoch,
            }
        )
        if site.sync.overlap.reason != self._overlap:
            self._overlap = site.sync.overlap.reason
            self._log.say(self._overlap)
        if site.routing is not None:
            self._log.event("routing", round=site.round, step=step, **site.routing)

    def validation(self, result: Validation) -> None:
        """Reports a validation."""
        if self._log is not None:
            self._log.validation(
                {
                    "round": self._site.round,
                    "step": self._site.step,
                    "loss": result.loss,
                    "bits_per_byte": result.bits_per_byte,
                    "tokens": result.tokens,
                    "seconds": result.seconds,
                    "load": result.load.tolist(),
                }
            )

    def sites(self, event: dict[str, Any]) -> None:
        """Reports that sites were lost or have joined. `event`: from `Company.recover` or `renew`.

        Only where this process speaks.
        """
        assert self._log is not None
        self._log.event("sites", **event)
        self._log.say(describe(event))

    def saved(self, outcome: Outcome | None, goes_on: str = ", training goes on") -> None:
        """Reports a checkpoint that was written or failed; None = nothing to report yet."""
        if outcome is None or self._log is None:
            return
        path, steps = outcome.path, ckpt.steps_of(outcome.path)
        about = {"round": outcome.round, "step": steps, "path": str(path)}
        if not outcome.error:
            self._log.event("checkpoint", **about)
            self._log.say(f"checkpoint {path}")
            for failed in self._failed:
                self._made_up_for += self._unwritten.forget(failed)
            self._failed.clear()
            return
        _log.error("fomoe train: could not write checkpoint %s%s: %s", path, goes_on, outcome.error)
        self._failed.append(path)
        self._unwritten.note(path, outcome.error, quiet=True)
        self._log.event("checkpoint_failed", **about, error=outcome.error)

    # ------------------------------------------------------------------------------------- at last

    def write(self, report: dict[str, Any]) -> None:
        """Writes the report into the run folder."""
        if self._log is not None:
            self._log.flush()
            write_report(self._site.run_dir, report, self._unwritten)

    def end(self, report: dict[str, Any]) -> None:
        """Reports the end of the job."""
        if self._log is None:
            return
        self._log.event("end", step=self._site.step, wall_s=report["run"]["wall_s"])
        self._log.say("")
        print_report(report, self._log.console, known_course(self._site.run_dir))
        written = self._site.run_dir / "report.md"
        if not self._unwritten.has(written):
            page = write_page(self._site.run_dir, report, self._unwritten)
            self._log.say(f"report in {written}" + (f" and {page.name}" if page else ""))

    def lost(self, lost: list[list[str]]) -> None:
        """Reports files that could not be written. `lost`: by process; this one's are added."""
        if self._log is None:
            return
        lost[self._site.world.process] = self._unwritten.entries()
        lines = dict.fromkeys(line for of_process in lost for line in of_process)
        lines |= dict.fromkeys(f"{line} (but a later one was)" for line in self._made_up_for)
        if lines:
            text = "\n".join(f"  {line}" for line in lines)
            _log.error("fomoe train: could not be written:\n%s", text)


def _console(unwritten: Unwritten) -> Console | None:
    """The launcher's output, for a site that takes over speaking; None = standard output."""
    if CONSOLE_FD not in os.environ:
        return None
    own = os.dup(int(os.environ[CONSOLE_FD]))
    file = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=SIMILAR)
    return Console(file=tolerant(file, unwritten))


def _about(site: TrainingSite) -> list[str]:
    """Lines that describe the run, the model and the machine."""
    config, world = site.config, site.world
    counts = count_parameters(config.model)
    over = f" over {site.link}" if site.link else ""
    ranks = f" of {world.ranks} ranks" if world.ranks > 1 else ""
    return [
        f"run {site.run_dir}: {site.data.description}",
        f"{world.num_sites} sites{ranks} x {config.inner.batch_size} x {config.model.seq_len} "
        f"tokens, replication {site.placement.replication}, {config.outer.optimizer}, "
        f"{config.outer.codec} on the wire{over}; {counts.total / 1e6:.2f} M parameters, "
        f"{counts.sparse_share:.0%} in experts; {site.device}, {torch.get_num_threads()} threads "
        f"per {'rank' if world.ranks > 1 else 'site'}",
        described(checkpoint_size(config, site.placement)),
    ]


def _tell_resumed(log: RunLog, site: TrainingSite, start: Start) -> None:
    """Reports the checkpoint that was resumed and the options that have changed."""
    step = site.step
    log.say(f"resumed from {start.resumed}: round {site.round}, step {step}")
    log.event("resumed", round=site.round, step=step, path=str(start.resumed))
    for line in told(start.changes):
        log.say(line)
    if start.changes:
        texts = {key: [*map(str, pair)] for key, pair in start.changes.items()}
        log.event("changed", step=step, options=texts)
