"""A process of the training job: `python -m fomoe_ext.train`, by `fomoe train` or torchrun.

It finds out which site and rank it is, agrees with the others where to begin, and trains to the
end.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.config.effects import without_effect
from fomoe_ext.config.io import flag_value
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.extras import NotInstalled
from fomoe_ext.fault.company import Company
from fomoe_ext.fault.membership import Finished, TooFew, join
from fomoe_ext.fault.reform import new_default_group
from fomoe_ext.files.outputs import named, options_of
from fomoe_ext.files.unwritten import Unwritten, tolerant_output
from fomoe_ext.launch import inject
from fomoe_ext.launch.console import outlive_terminal
from fomoe_ext.launch.logs import shown
from fomoe_ext.launch.processes import EXIT_PEER_LOST
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
from fomoe_ext.outer.errors import MeetingError
from fomoe_ext.report.runs import HELD, Job, find_job
from fomoe_ext.train.divergence import Diverged
from fomoe_ext.train.site import TrainingSite
from fomoe_ext.train.start import (
    OtherSiteFailed,
    Start,
    agree_on_start,
    note_uncached,
    save_run_config,
    start_alone,
)
from fomoe_ext.train.trainer import Trainer

_log = logging.getLogger(__name__)


def run_site(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    *,
    unnamed: bool = False,
    unwritten: Unwritten | None = None,
) -> int:
    """Runs one process of a job to its end and returns the exit code; all processes must call it.

    `config` and `unnamed`: from `runs.find_job`. `unwritten` collects files that could not be
    written. Raises ValueError, TypeError, FileNotFoundError and CheckpointError for errors in
    options or files, Diverged for NaN, and MeetingError or PeerLost if a meeting fails, a site is
    lost or too few sites are left.
    """
    unwritten, job = unwritten or Unwritten(), Job(config, unnamed)
    use_threads(config.sites.threads, world)
    device = choose_device(config.run.device, world)
    run = _run_among_changing if config.fault.tolerant else _run_among_all
    return run(job, world, device, stop, unwritten)


def _run_among_all(
    job: Job, world: World, device: torch.device, stop: StopRequest, unwritten: Unwritten
) -> int:
    """Runs a site of a job that ends as soon as one site is lost."""
    with ExitStack() as stack, joined(world, job.config.outer.timeout_s, device.type):
        start = agree_on_start(job, world, stack)
        site = TrainingSite(start.config, world, start.data, device, start.resumed)
        return _train(site, start, stop, unwritten)


def _run_among_changing(
    job: Job, world: World, device: torch.device, stop: StopRequest, unwritten: Unwritten
) -> int:
    """Runs a site of a job that continues when sites are lost (`fomoe_ext.fault`).

    This site may itself join late.
    """
    config, timeout_s = job.config, job.config.outer.timeout_s
    end_with_launcher()
    try:
        membership = join(config.fault, world.site, config.sites.sites)
        inject.arm(world.site if membership.incarnation == 1 else -1)
        view = membership.begin(timeout_s)
        company: Company | None = None
        lost = lambda: membership.lost() if company is None else company.lost()
        with ExitStack() as stack, watched(lost):
            if view is None:
                world = dataclasses.replace(world, site=0, num_sites=1, members=(world.site,))
                start = start_alone(job, stack)
            else:
                world = world.of_members(view.members)
                with with_others("joining the other sites", world.site):
                    new_default_group(view, world, timeout_s)
                start = agree_on_start(job, world, stack)
            site = TrainingSite(
                start.config, world, start.data, device, start.resumed, late=view is None
            )
            company = Company(membership, site)
            return _train(site, start, stop, unwritten, company)
    except Finished:
        _log.info("site %d: the job has ended without it", world.number)
    except TooFew as error:
        raise PeerLost(str(error)) from error
    return 0


def _train(
    site: TrainingSite,
    start: Start,
    stop: StopRequest,
    unwritten: Unwritten,
    company: Company | None = None,
) -> int:
    """Trains with a site that is ready, and returns the exit code."""
    stop.install()
    trainer = Trainer(site, stop, company, start, unwritten)
    note_uncached(start.data, site.world, unwritten)
    if site.late:
        assert company is not None
        view = company.membership.knock(site.config.outer.timeout_s)
        trainer.company_changed(company.join(view))
    else:
        save_run_config(start, site.world, site.step, unwritten)
        if site.world.process == 0:
            trainer.speaker.open(at_start=True)
    return trainer.run_to_end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one process; returns its exit code, or ends the process at once after an error."""
    outlive_terminal()
    args = sys.argv[1:] if arguments is None else arguments
    unwritten = Unwritten()
    with tolerant_output(unwritten):
        return _main(args, unwritten)


def _main(args: Sequence[str], unwritten: Unwritten) -> int:
    where, code = "fomoe train", 1
    try:
        config, unnamed = find_job(args, "python -m fomoe_ext.train")
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
        with shown():
            code = run_site(config, world, StopRequest(), unnamed=unnamed, unwritten=unwritten)
        if config.fault.tolerant:
            end_now(code)  # a normal exit would wait for process groups of lost sites
        return code
    except (PeerLost, OtherSiteFailed) as error:
        message, code = error, EXIT_PEER_LOST
    except MeetingError as error:
        lost = error.__cause__ is not None and is_peer_error(error.__cause__)
        message, code = error, EXIT_PEER_LOST if lost else 1
    except Diverged as error:
        message = error
    except (ValueError, TypeError, OSError, ckpt.CheckpointError, NotInstalled) as error:
        message = named(error, options_of(list(args)))
    except ImportError as error:
        if not str(error).startswith("fomoe_ext: "):  # ours: the package is not built
            raise
        message = error
    print(f"{where}: {message}", file=sys.stderr, flush=True)
    end_now(code)
    return code
