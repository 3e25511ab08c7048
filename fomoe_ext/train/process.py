"""A process of the training job: `python -m fomoe_ext.train`, by `fomoe train` or torchrun.

A round: local steps; a note to all others; the meeting (`fomoe_ext.outer`), or a checkpoint when a
site was asked to stop. Every site counts what it does (`fomoe_ext.train.tally`); site 0 speaks.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.pending import Outcome
from fomoe_ext.config.effects import changes, told, without_effect
from fomoe_ext.config.io import save_config
from fomoe_ext.config.job import TrainConfig, count_parameters
from fomoe_ext.data.sequences import TextData
from fomoe_ext.extras import NotInstalled
from fomoe_ext.fault.company import Company
from fomoe_ext.files.atomic import replace_file
from fomoe_ext.files.outputs import named, options_of
from fomoe_ext.files.unwritten import EXIT_UNWRITTEN, Unwritten, tolerant, tolerant_output
from fomoe_ext.launch import inject
from fomoe_ext.launch.console import outlive_terminal
from fomoe_ext.launch.processes import CONSOLE_FD, EXIT_PEER_LOST, EXIT_STOPPED
from fomoe_ext.launch.waiting import watched
from fomoe_ext.launch.world import (
    PeerLost,
    StopRequest,
    World,
    choose_device,
    end_now,
    end_with_launcher,
    find_world,
    is_peer_error,
    joined,
    use_threads,
    with_others,
)
from fomoe_ext.model.evaluate import Validation
from fomoe_ext.outer import MeetingError
from fomoe_ext.outer.staged import MeetingLost
from fomoe_ext.plan import traffic as plan
from fomoe_ext.plan.traffic import RoundNote
from fomoe_ext.report.metrics import RunLog, rewind_metrics
from fomoe_ext.report.report import print_report, write_report
from fomoe_ext.report.runs import (
    CONFIG,
    HELD,
    METRICS,
    Job,
    flag_value,
    join_folder,
    load_run_config,
    settled_job,
)
from fomoe_ext.report.story import describe
from fomoe_ext.train.job import learning_rate
from fomoe_ext.train.start import (
    OtherSiteFailed,
    agree_on_run,
    gather,
    job_name,
    open_text,
    settle_changes,
)
from fomoe_ext.train.trainer import TrainingSite

_FINAL_EVAL = 8
"""The last validation uses so many times the tokens of those before it."""


class _Job:
    """The rounds of a site and what is said and saved about them."""

    def __init__(
        self,
        site: TrainingSite,
        stop: StopRequest,
        company: Company | None = None,
        unwritten: Unwritten | None = None,
    ) -> None:
        self.site, self.stop, self.company = site, stop, company
        self.unwritten = unwritten or Unwritten()
        self.log: RunLog | None = None
        self.run = site.config.run
        self._renew, self._came = False, False
        self._due_at_end = False
        """Whether the last checkpoint is still to be written."""
        self._unsaved = False
        """Whether the last one that was waited for could not be."""
        self._failed: list[Path] = []
        """Checkpoints that could not be written, since the last that was."""
        self._made_up_for: list[str] = []
        """What is told of those before it."""

    def run_to_end(self) -> int:
        """What is left of the job, and its report; the exit code."""
        try:
            code = 0
            if self.train():
                code = EXIT_STOPPED
                self._tell_lost([[] for _ in range(self.site.world.processes)])
            else:
                self.finish()
        finally:
            self.close()
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
                if self._step():
                    return True
            except (PeerLost, MeetingLost) as error:
                self.recover(error)
        return False

    def recover(self, error: Exception) -> None:
        """Goes on with the sites that are left; raises the error where the job cannot."""
        if self.company is None:
            raise error
        self._renew = False
        self.tell_of_company(self.company.recover(str(error)))

    def tell_of_company(self, event: dict[str, Any]) -> None:
        """The sites are others than before."""
        # Who has come joins in with what the others do next, between two rounds.
        self._came = self.site.world.number in event["joined"]
        if self.site.world.process == 0:
            if self.log is None:
                self.open_log(None)
            assert self.log is not None
            self.log.event("sites", **event)
            self.log.say(describe(event))
        elif self.log is not None:
            self.close()

    def open_log(self, resumed: Path | None) -> None:
        """Begins to speak for all sites. `resumed`: the checkpoint that the job goes on from."""
        self.log = _make_log(self.site, resumed, self.unwritten).__enter__()

    def close(self) -> None:
        """Closes the log, where this site keeps it."""
        log, self.log = self.log, None
        if log is not None:
            log.__exit__(None, None, None)

    def _step(self) -> bool:
        """A round and what is due after it; True when the job was stopped."""
        site = self.site
        if self._round():
            return True
        self._tell_saved(site.checkpoints.poll())
        if site.round == site.rounds:
            self._due_at_end = True
            return False
        if self.run.eval_rounds and site.round % self.run.eval_rounds == 0:
            self._validate(self.run.eval_tokens)
        if self.company is not None and (self._renew or not self.company.is_level()):
            self._renew = False
            self.tell_of_company(self.company.renew())
        self._start_save_if_due()
        return False

    def _start_save_if_due(self) -> None:
        every, site = self.run.checkpoint_rounds, self.site
        if every and site.round and site.round % every == 0:
            self._start_save(site.step)

    def _round(self) -> bool:
        """One round; True when it ended in a checkpoint because a site was asked to stop."""
        site, start = self.site, time.perf_counter()
        tokens_before = site.tally.tokens
        inject.in_round(site.round + 1)

        def after_step(loss: Tensor) -> None:
            if self.log is not None:
                rate = (site.tally.tokens - tokens_before) / (time.perf_counter() - start)
                all_sites = rate * site.world.processes
                self.log.step(site.step, lambda: float(loss), all_sites)

        sent_before, exchange_before = site.bytes_sent, site.tally.exchange_s
        site.take_local_steps(self.stop, after_step)
        before_notes = time.perf_counter()
        site.tally.local_s += before_notes - start
        notes = self._exchange_notes()
        waited = time.perf_counter() - before_notes
        stopping = any(note.stop for note in notes)
        if stopping and any(note.left for note in notes):
            site.tally.meeting_s += waited
            if site.world.rank == 0:
                site.tally.planned_bytes += (site.world.num_sites - 1) * plan.NOTE_BYTES
            self._save(int(max(note.steps for note in notes)))
            return True
        validated = site.tally.validation_s
        meeting = waited + site.meet()
        wall = time.perf_counter() - start - (site.tally.validation_s - validated)
        site.tally.local_s += wall - meeting - (before_notes - start)
        site.tally.meeting_s += meeting
        sent = int(site.sync.ranks.sum_(torch.tensor(site.bytes_sent - sent_before)))
        if self.log is not None:
            self._tell_round(notes, sent, wall, meeting, tokens_before, exchange_before)
        if stopping:
            self._save(site.step)
        return stopping

    def _exchange_notes(self) -> list[RoundNote]:
        """The notes of all sites; who does not come in time may be gone on without."""
        if self.company is None:
            return self.site.exchange_notes(self.stop.asked)
        inject.point("notes")
        with self.company.patience():
            notes = self.site.exchange_notes(self.stop.asked, self.company.membership.knocked())
        self._renew = any(note.knocks for note in notes)
        return notes

    def _tell_round(
        self,
        notes: Sequence[RoundNote],
        sent: int,
        wall: float,
        meeting: float,
        tokens_before: int,
        exchange_before: float,
    ) -> None:
        site = self.site
        assert self.log is not None
        slots = sum(note.slots for note in notes)
        step = site.step
        # A site whose parameters are NaN is left out here too.
        losses = [(note.loss, note.taken) for note in notes if math.isfinite(note.loss)]
        taken = sum(note.taken for note in notes)
        per_site = taken / len(notes) / (notes[site.world.site].taken or 1)
        total = site.rounds * site.local_steps
        self.log.round(
            {
                "round": site.round,
                "step": step,
                "loss": sum(loss for loss, _ in losses) / (sum(steps for _, steps in losses) or 1),
                "lr": learning_rate(site.config.inner, step - 1, total),
                "tokens_per_s": (site.tally.tokens - tokens_before)
                * per_site
                * site.world.processes
                / wall,
                "skipped_share": 1 - sum(note.rows for note in notes) / slots,
                "bytes_sent": sent,
                "meeting_s": meeting,
                "exchange_s": site.tally.exchange_s - exchange_before,
                "epoch": site.batches.epoch,
            }
        )
        if site.routing is not None:
            self.log.event("routing", round=site.round, step=step, **site.routing)

    def _validate(self, max_tokens: int) -> Validation:
        result = self.site.validate(max_tokens)
        if self.log is not None:
            self.log.validation(
                {
                    "round": self.site.round,
                    "step": self.site.step,
                    "loss": result.loss,
                    "bits_per_byte": result.bits_per_byte,
                    "tokens": result.tokens,
                    "seconds": result.seconds,
                    "load": result.load.tolist(),
                }
            )
        return result

    def _save(self, steps: int) -> None:
        """A checkpoint that is waited for; where it cannot be written that is told."""
        self._tell_saved(self.site.checkpoints.poll(wait=True))
        outcome = self.site.checkpoints.save(steps)
        self._unsaved = bool(outcome.error)
        self._tell_saved(outcome, "")

    def _start_save(self, steps: int) -> None:
        """A checkpoint during the training, which goes on where it cannot be written."""
        checkpoints, behind = self.site.checkpoints, self.run.async_checkpoints
        self._tell_saved(checkpoints.poll(wait=True))  # of the one before, if that still lasts
        checkpoints.start(steps, copy=behind)
        if not behind:
            self._tell_saved(checkpoints.poll(wait=True))

    def _tell_saved(self, outcome: Outcome | None, goes_on: str = ", training goes on") -> None:
        if outcome is None or self.log is None:
            return
        path, steps = outcome.path, ckpt.steps_of(outcome.path)
        about = {"round": outcome.round, "step": steps, "path": str(path)}
        if not outcome.error:
            self.log.event("checkpoint", **about)
            self.log.say(f"checkpoint {path}")
            for failed in self._failed:
                self._made_up_for += self.unwritten.forget(failed)
            self._failed.clear()
            return
        print(
            f"fomoe train: could not write checkpoint {path}{goes_on}: {outcome.error}",
            file=sys.stderr,
            flush=True,
        )
        self._failed.append(path)
        self.unwritten.note(path, outcome.error, quiet=True)
        self.log.event("checkpoint_failed", **about, error=outcome.error)

    def finish(self) -> None:
        """The last checkpoint, the last validation and the report."""
        while True:
            try:
                return self._finish()
            except (PeerLost, MeetingLost) as error:
                self.recover(error)

    def _finish(self) -> None:
        site = self.site
        if self._due_at_end:
            self._save(site.step)
        site.finish()
        validation = self._validate(_FINAL_EVAL * self.run.eval_tokens)
        report = site.report(validation)
        if self.log is not None:
            self.log.flush()
            write_report(site.run_dir, report, self.unwritten)
        # Who leaves before all have what they need would be missed by the others.
        lost = gather(self.unwritten.entries(), site.world, "the end")
        if self.company is not None:
            self.company.membership.finish()
        if self.log is not None:
            self.log.event("end", step=site.step, wall_s=report["run"]["wall_s"])
            self.log.say("")
            print_report(report, self.log.console)
            if not self.unwritten.has(site.run_dir / "report.md"):
                self.log.say(f"report in {site.run_dir / 'report.md'}")
        self._tell_lost(lost)

    def _tell_lost(self, lost: list[list[str]]) -> None:
        """What could not be written, by process."""
        if self.log is None:
            return
        lost[self.site.world.process] = self.unwritten.entries()
        lines = dict.fromkeys(line for of_process in lost for line in of_process)
        lines |= dict.fromkeys(f"{line} (but a later one was)" for line in self._made_up_for)
        if lines:
            text = "\n".join(f"  {line}" for line in lines)
            print(f"fomoe train: could not be written:\n{text}", file=sys.stderr, flush=True)


def _console(unwritten: Unwritten) -> Console | None:
    """The launcher's own, for a site that has not always spoken for all; None = standard output."""
    if CONSOLE_FD not in os.environ:
        return None
    file = os.fdopen(os.dup(int(os.environ[CONSOLE_FD])), "w")
    return Console(file=tolerant(file, unwritten))


def _make_log(site: TrainingSite, resumed: Path | None, unwritten: Unwritten) -> RunLog:
    run, step = site.config.run, site.step
    if run.resume is not None:
        try:
            rewind_metrics(site.run_dir / METRICS, step)
        except OSError as error:
            unwritten.note(site.run_dir / METRICS, error, "from before")
    log = RunLog(
        site.run_dir,
        total_rounds=site.rounds,
        local_steps=site.local_steps,
        first_step=step,
        tensorboard=run.tensorboard,
        console=_console(unwritten),
        unwritten=unwritten,
    )
    config, world = site.config, site.world
    log.say(f"run {site.run_dir}: {site.data.description}")
    counts = count_parameters(config.model)
    over = f" over {site.link}" if site.link else ""
    ranks = f" of {world.ranks} ranks" if world.ranks > 1 else ""
    log.say(
        f"{world.num_sites} sites{ranks} x {config.inner.batch_size} x {config.model.seq_len} "
        f"tokens, replication {site.placement.replication}, {config.outer.optimizer}, "
        f"{config.outer.codec} on the wire{over}; {counts.total / 1e6:.2f} M parameters, "
        f"{counts.sparse_share:.0%} in experts; {site.device}, {torch.get_num_threads()} threads "
        f"per {'rank' if world.ranks > 1 else 'site'}"
    )
    for note in site.notes:
        log.say(note)
    if resumed is not None:
        log.say(f"resumed from {resumed}: round {site.round}, step {step}")
        log.event("resumed", round=site.round, step=step, path=str(resumed))
        for line in told(site.changes):
            log.say(line)
        if site.changes:
            texts = {key: [*map(str, pair)] for key, pair in site.changes.items()}
            log.event("changed", step=step, options=texts)
    return log


def run_tolerant_site(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    *,
    unnamed: bool = False,
    unwritten: Unwritten | None = None,
) -> int:
    """`run_site` of a job that outlives its sites (`fomoe_ext.fault`).

    Raises what `run_site` does, PeerLost when too few sites are left.
    """
    from fomoe_ext.fault.membership import Finished, TooFew, join
    from fomoe_ext.fault.reform import new_default_group

    unwritten, job = unwritten or Unwritten(), Job(config, unnamed)
    use_threads(config.sites.threads, world)
    device = choose_device(config.run.device, world)
    end_with_launcher()
    try:
        membership = join(config.fault, world.site, config.sites.sites)
        inject.arm(world.site if membership.incarnation == 1 else -1)
        view = membership.begin(config.outer.timeout_s)
        company: Company | None = None
        lost = lambda: membership.lost() if company is None else company.lost()
        with ExitStack() as stack, watched(lost):
            late = view is None
            if late:
                world = dataclasses.replace(world, site=0, num_sites=1, members=(world.site,))
                assert config.run.run_dir is not None
                stack.callback(join_folder(config.run.run_dir, job_name(config)).release)
                data, resumed, notes = open_text(config, World()), None, []
            else:
                world = world.of_members(view.members)
                with with_others("joining the other sites", world.site):
                    new_default_group(view, world, config.outer.timeout_s)
                config, resumed, notes = agree_on_run(job, world, stack)
                data = open_text(config, world)
            config = config.with_vocab(data.vocab_size)
            changed = {} if late else settle_changes(config, world, resumed)
            site = TrainingSite(config, world, data, device, resumed, late=late)
            site.notes[:0], site.changes = notes, changed
            company = Company(membership, site)
            stop.install()
            rounds = _Job(site, stop, company, unwritten)
            _note_uncached(data, world, unwritten)
            if late:
                rounds.tell_of_company(company.join(membership.knock(config.outer.timeout_s)))
            else:
                _save_config(site, unwritten)
                if world.process == 0:
                    rounds.open_log(resumed)
            return rounds.run_to_end()
    except Finished:
        print(f"site {world.number}: the job has ended without it", flush=True)
    except TooFew as error:
        raise PeerLost(str(error)) from error
    return 0


def _note_uncached(data: TextData, world: World, unwritten: Unwritten) -> None:
    """Tells, for all processes of a machine, of tokens that could not be kept."""
    if data.uncached is not None and world.leads_machine:
        unwritten.note(*data.uncached, "tokens are kept in memory")


def _save_config(site: TrainingSite, unwritten: Unwritten) -> None:
    """The configuration in force, and beside it the one of before where that was another.

    Raises OSError where a run that begins cannot be written to; one that goes on does.
    """
    if not site.world.leads_machine:
        return
    config, file = site.config, site.run_dir / CONFIG
    try:
        if site.resumed and file.is_file() and load_run_config(site.run_dir) != config:
            _keep_config(site)
        saved = dataclasses.replace(config.run, resume=None)
        save_config(dataclasses.replace(config, run=saved), file)
    except OSError as error:
        if not site.resumed:
            raise
        unwritten.note(error.filename or file, error)


def _keep_config(site: TrainingSite) -> None:
    """Keeps the configuration of before beside the one in force, where they differ in more than
    where the run is and what it goes on from."""
    if not changes(load_run_config(site.run_dir), site.config):
        return
    name = f"config-until-step-{site.step:08d}"
    kept, number = site.run_dir / f"{name}.toml", 1
    while kept.exists():
        number += 1
        kept = site.run_dir / f"{name}-{number}.toml"
    with replace_file(kept) as temporary:
        shutil.copyfile(site.run_dir / CONFIG, temporary)


def run_site(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    *,
    unnamed: bool = False,
    unwritten: Unwritten | None = None,
) -> int:
    """Runs one site of a job to its end; all sites of the job must. Returns the exit code.

    `config` and `unnamed` are as `runs.settled_job` makes them, `unwritten` has what could not be
    written. Raises ValueError, TypeError, FileNotFoundError and
    CheckpointError for what the user can mend, MeetingError and PeerLost when the sites fall apart.
    """
    unwritten, job = unwritten or Unwritten(), Job(config, unnamed)
    use_threads(config.sites.threads, world)
    device = choose_device(config.run.device, world)
    with ExitStack() as stack, joined(world, config.outer.timeout_s, device.type):
        config, resumed, notes = agree_on_run(job, world, stack)
        data = open_text(config, world)
        config = config.with_vocab(data.vocab_size)
        changed = settle_changes(config, world, resumed)
        site = TrainingSite(config, world, data, device, resumed)
        site.notes[:0], site.changes = notes, changed
        _save_config(site, unwritten)
        rounds = _Job(site, stop, unwritten=unwritten)
        _note_uncached(data, world, unwritten)
        if world.process == 0:
            rounds.open_log(resumed)
        stop.install()
        return rounds.run_to_end()


def main(arguments: Sequence[str] | None = None) -> int:
    """The process of one site; returns its exit code, or ends the process when a site is lost."""
    outlive_terminal()
    args = sys.argv[1:] if arguments is None else arguments
    unwritten = Unwritten()
    with tolerant_output(unwritten):
        return _main(args, unwritten)


def _main(args: Sequence[str], unwritten: Unwritten) -> int:
    where, code = "fomoe train", 1
    try:
        config, unnamed = settled_job(args, "python -m fomoe_ext.train")
        world = find_world(config.sites.sites, ranks_per_site=config.sites.ranks_per_site)
        if world.process == 0 and HELD not in os.environ:
            lines = without_effect(config, args, flag_value(args, "--config"))
            if config.fault.restarts:
                lines.append("--restarts has no effect without a launcher, which `fomoe train` is")
            for line in lines:
                print(f"fomoe train: {line}", file=sys.stderr, flush=True)
        where = f"fomoe train, site {world.site}"
        if world.ranks > 1:
            where += f", rank {world.rank}"
        if config.fault.tolerant:
            code = run_tolerant_site(
                config, world, StopRequest(), unnamed=unnamed, unwritten=unwritten
            )
            end_now(code)  # groups of sites that are gone would be waited for
            return code
        return run_site(config, world, StopRequest(), unnamed=unnamed, unwritten=unwritten)
    except (PeerLost, OtherSiteFailed) as error:
        message, code = error, EXIT_PEER_LOST
    except MeetingError as error:
        lost = error.__cause__ is not None and is_peer_error(error.__cause__)
        message, code = error, EXIT_PEER_LOST if lost else 1
    except (ValueError, TypeError, OSError, ckpt.CheckpointError, NotInstalled) as error:
        message = named(error, options_of(list(args)))
    except ImportError as error:
        if not str(error).startswith("fomoe_ext: "):  # ours: the package is not built
            raise
        message = error
    print(f"{where}: {message}", file=sys.stderr, flush=True)
    end_now(code)
    return code
