"""How the processes of a job agree on its start: run folder, checkpoint, text and changed options.
The configuration is then saved in the run folder.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fomoe_ext.checkpoint import manifest as ckpt
from fomoe_ext.checkpoint.publish import clear_leftovers
from fomoe_ext.checkpoint.whole import newest_whole, require_whole_everywhere
from fomoe_ext.config.changes import changes, check_changes
from fomoe_ext.config.io import save_config
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.config.vocabulary import vocabulary_notes
from fomoe_ext.data.sequences import TextData, open_job_data
from fomoe_ext.fault.lighthouse import LIGHTHOUSE
from fomoe_ext.files.atomic import replace_file
from fomoe_ext.files.folder_lock import Held
from fomoe_ext.files.unwritten import Unwritten
from fomoe_ext.launch.messages import gather_objects
from fomoe_ext.launch.world import World, with_others
from fomoe_ext.report.runs import (
    AUTO,
    CHECKPOINTS,
    CONFIG,
    HELD,
    Job,
    check_folder,
    claim,
    join_folder,
    load_run_config,
    run_of,
)
from fomoe_ext.train.job import learning_rate

_SCHEDULE_POINTS = 1000
"""Number of steps at which two learning rate schedules are compared."""


def open_text(config: TrainConfig, world: World) -> TextData:
    """The tokenized text; the first process of a machine tokenizes it, and the others read that."""

    def read() -> TextData:
        return open_job_data(config, check=world.leads_machine)

    opened, problem = None, None
    for turn in (world.leads_machine, not world.leads_machine):
        if turn:
            try:
                opened = read()
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                problem = error
        agree(problem, world, "the data")
    assert opened is not None
    return opened


def gather(value: Any, world: World, what: str) -> list[Any]:
    """The values of all processes, in order; a collective.

    `what` names it in the error if a site is lost.
    """
    with with_others(what, world.site):
        return gather_objects(value, world.processes)


class OtherSiteFailed(RuntimeError):
    """Another site could not begin; it reports the reason itself."""


def agree(problem: Exception | None, world: World, what: str) -> None:
    """Raises this process's problem, or OtherSiteFailed if another process has one.

    A collective.
    """
    problems = gather(str(problem) if problem else "", world, what)
    if problem is not None:
        raise problem
    for process, text in enumerate(problems):
        if text:
            raise OtherSiteFailed(f"site {process // world.ranks}: {text}")


class Start(NamedTuple):
    """What all processes have agreed on before training begins."""

    config: TrainConfig
    """With site 0's run folder and the text's vocabulary."""
    data: TextData
    resumed: Path | None = None
    """The checkpoint to continue."""
    notes: Sequence[str] = ()
    """Lines for the user about the choice of the checkpoint."""
    changes: Mapping[str, tuple[Any, Any]] = MappingProxyType({})
    """Options that differ from those of the run so far (`config.changes.changes`)."""


def agree_on_start(job: Job, world: World, stack: ExitStack) -> Start:
    """What the job starts from, equal on all processes; a collective.

    The run folder is locked until `stack` is closed.
    """
    config = _hold_folder(job, world, stack)
    resumed, notes = _checkpoint_of(config, world)
    data = open_text(config, world)
    config = config.with_vocab(data.vocab_size)
    notes = [*notes, *vocabulary_notes(config, data.vocab_size)]
    return Start(config, data, resumed, notes, _agree_on_changes(config, world, resumed))


def start_alone(job: Job, stack: ExitStack) -> Start:
    """What a site that joins late starts from; it gets everything else from the other sites."""
    config = job.config
    assert config.run.run_dir is not None
    stack.callback(join_folder(config.run.run_dir, job_name(config)).release)
    data = open_text(config, World())
    return Start(config.with_vocab(data.vocab_size), data)


def job_name(config: TrainConfig) -> str | None:
    """The name by which the processes of one job share its run folder; None without such a name."""
    lighthouse = None
    if config.fault.membership == "torchft":
        lighthouse = config.fault.lighthouse or os.environ.get(LIGHTHOUSE)
    return os.environ.get(HELD, f"lighthouse {lighthouse}" if lighthouse else None)


def _hold_folder(job: Job, world: World, stack: ExitStack) -> TrainConfig:
    """The configuration with site 0's run folder, which all processes lock until `stack` is closed.

    A collective.
    """
    config, name = job.config, job_name(job.config)
    held: Held | None = None
    problem: Exception | None = None
    if world.process == 0:
        try:
            if name is None:
                config, held, _ = claim(job)
            else:
                assert config.run.run_dir is not None
                held = join_folder(config.run.run_dir, name)
                check_folder(config)
        except (ValueError, OSError) as error:
            problem = error
    if held is not None:
        stack.callback(held.release)
    agree(problem, world, "the run folder")
    told = None if held is None else [str(config.run.run_dir), held.job]
    named, name = gather(told, world, "the run folder")[0]
    run_dir = Path(named)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=run_dir))
    try:
        if held is None:
            stack.callback(join_folder(run_dir, name).release)
        if world.leads_machine:
            clear_leftovers(run_dir / CHECKPOINTS)
    except (ValueError, OSError) as error:
        problem = error
    agree(problem, world, "the run folder")
    return config


def _checkpoint_of(config: TrainConfig, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume, if any, and lines for the user about it; a collective."""
    run_dir = config.run.run_dir
    if config.run.resume is None:
        return None, []
    automatic = config.run.resume == AUTO
    assert run_dir is not None
    target = run_dir if automatic else Path(config.run.resume)
    share = (world.local_process, world.local_processes)
    if not automatic and run_of(target) != target:  # a checkpoint by name
        with with_others("the checkpoint", world.site):
            require_whole_everywhere(target, world.processes, share)
        return target, []
    with with_others("the checkpoint", world.site):
        found = newest_whole(target / CHECKPOINTS, world.processes, share=share)
    notes = [f"skipped: {reason}" for reason in found.skipped]
    if found.path is None and not automatic:
        raise ckpt.CheckpointError(
            f"there is no whole checkpoint to resume in {target / CHECKPOINTS} "
            f"({'; '.join(found.skipped) or 'it has none'})"
        )
    if found.path is None:
        notes.append(f"no whole checkpoint in {target / CHECKPOINTS}: from the beginning")
    return found.path, notes


def _agree_on_changes(config: TrainConfig, world: World, resumed: Path | None) -> dict[str, Any]:
    """Options that differ from those of the resumed run; a collective.

    If an option may not change, this raises ValueError, or OtherSiteFailed on the other processes.
    """
    problem: Exception | None = None
    found: dict[str, Any] = {}
    if resumed is not None and world.process == 0:
        try:
            assert config.run.run_dir is not None
            file = config.run.run_dir / CONFIG
            old = load_run_config(config.run.run_dir) if file.is_file() else None
            done = ckpt.read_manifest(resumed).round
            found = {} if old is None else changes(old, config)
            check_changes(old, config, done)
            if old is not None:
                _check_schedule(old, config, done)
        except (ValueError, TypeError, OSError, ckpt.CheckpointError) as error:
            problem = error
    agree(problem, world, "the configuration")
    return found


def _check_schedule(old: TrainConfig, new: TrainConfig, done: int) -> None:
    """Raises ValueError for a changed schedule option that has no effect on the remaining rounds.

    `done`: rounds that are completed.
    """
    each = new.run.local_steps
    first, total = done * each, new.run.resolved_rounds * each
    left = range(first, total, max(1, (total - first) // _SCHEDULE_POINTS))
    course = lambda inner: [learning_rate(inner, step, total) for step in left]
    for name in ("warmup_steps", "schedule", "min_lr_ratio", "inner_lr"):
        before = dataclasses.replace(new.inner, **{name: getattr(old.inner, name)})
        if left and before != new.inner and course(before) == course(new.inner):
            raise ValueError(
                f"inner.{name} has no effect any more: the learning rate of the remaining rounds "
                "stays the same"
            )


def note_uncached(data: TextData, world: World, unwritten: Unwritten) -> None:
    """Notes tokens that could not be cached on disk, once per machine."""
    if data.uncached is not None and world.leads_machine:
        unwritten.note(*data.uncached, "tokens are kept in memory")


def save_run_config(start: Start, world: World, step: int, unwritten: Unwritten) -> None:
    """Saves the configuration in the run folder.

    If it differs from the one there, that one is kept under a name with `step`, the last local step
    that it was used for. Raises OSError if the folder of a new run cannot be written to; a resumed
    run continues without.
    """
    if not world.leads_machine:
        return
    config, run_dir = start.config, start.config.run.run_dir or Path(".")
    file = run_dir / CONFIG
    try:
        if start.resumed and file.is_file() and load_run_config(run_dir) != config:
            _keep_config(config, run_dir, step)
        saved = dataclasses.replace(config.run, resume=None)
        save_config(dataclasses.replace(config, run=saved), file)
    except OSError as error:
        if not start.resumed:
            raise
        unwritten.note(error.filename or file, error)


def _keep_config(config: TrainConfig, run_dir: Path, step: int) -> None:
    """Keeps the old configuration beside the new one, unless only run_dir and resume differ."""
    if not changes(load_run_config(run_dir), config):
        return
    name = f"config-until-step-{step:08d}"
    kept, number = run_dir / f"{name}.toml", 1
    while kept.exists():
        number += 1
        kept = run_dir / f"{name}-{number}.toml"
    with replace_file(kept) as temporary:
        shutil.copyfile(run_dir / CONFIG, temporary)
