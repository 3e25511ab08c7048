"""Run folders: where a job writes, and which one it continues. Needs no torch.

<run>/.lock                      the job that is writing here (`folder_lock`)
<run>/config.toml                the resolved configuration, with its hash (`atomic.seal_text`)
<run>/config-until-step-N.toml   the previous one, if a resumed job changed it after N local steps
<run>/metrics.jsonl              a line per round and validation
<run>/tensorboard/               the same for TensorBoard
<run>/checkpoints/step-00000640/ see `fomoe_ext.checkpoint`
<run>/logs/site-1.log            output of each site except the first (local launch)
<run>/report.md, report.json     at the end
<run>/report.html                the same with plots, if the extra `plot` is installed
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fomoe_ext.config.io import flag_value, load_config, parse_args
from fomoe_ext.config.job import TrainConfig
from fomoe_ext.files.atomic import check_text_seal
from fomoe_ext.files.folder_lock import Held, hold

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
REPORT = "report.json"
PAGE = "report.html"
RUNS = Path("runs")


def run_of(path: Path) -> Path:
    """The run folder of a run folder or of a checkpoint in one."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


AUTO = "auto"
"""`resume`: the newest complete checkpoint of the run folder, or step 0 if there is none."""


def newest_run(folder: Path = RUNS) -> Path | None:
    """The run folder in `folder` that was begun last, or None."""
    runs = [path.parent for path in folder.glob(f"*/{CONFIG}")] if folder.is_dir() else []
    return max(runs, key=lambda path: ((path / CONFIG).stat().st_mtime_ns, path.name), default=None)


def _run_to_resume(resume: str, run_dir: Path | None) -> Path | None:
    """The run folder to resume; None if "auto" finds no run."""
    return (run_dir or newest_run()) if resume in ("", AUTO) else run_of(Path(resume))


class Job(NamedTuple):
    """A job's configuration, with its run folder. unnamed: whether the user did not choose the
    folder; then another is used if it is taken."""

    config: TrainConfig
    unnamed: bool


def job_config(args: Sequence[str], prog: str = "fomoe train") -> TrainConfig:
    """The configuration of `find_job`."""
    return find_job(args, prog).config


def find_job(args: Sequence[str], prog: str = "fomoe train") -> Job:
    """A job from its arguments: its configuration, with the run folder and what it resumes.

    A resumed job has the configuration saved with its run, unless --config or --preset is given;
    other flags change it. `--resume auto` starts from step 0 if there is no such run. Raises what
    `parse_args` raises, ValueError for a run that should continue in another folder or whose
    configuration is damaged, and FileNotFoundError if a named run does not exist.
    """
    args = list(args)
    resume, given = flag_value(args, "--resume"), flag_value(args, "--run-dir")
    known: Path | None = Path(given) if given else None
    from_file = any(flag_value(args, f) for f in ("--config", "--preset"))
    if resume is not None and not from_file:
        found = _run_to_resume(resume, known)
        if found is not None and (found / CONFIG).is_file():
            check_text_seal(found / CONFIG)
            _require_same(resume, found, known)
            args += ["--config", str(found / CONFIG)]
            known = known or found  # the folder may have moved since
        elif resume not in ("", AUTO):
            raise FileNotFoundError(f"--resume must be a run folder with {CONFIG}, got {found}")
    config = parse_args(args, prog)
    run = config.run
    if run.resume is not None:
        automatic = run.resume in ("", AUTO)
        folder = known or _run_to_resume(run.resume, run.run_dir)
        if not automatic and from_file:
            _require_same(run.resume, run_of(Path(run.resume)), known or run.run_dir)
        run = dataclasses.replace(run, resume=AUTO if automatic else run.resume, run_dir=folder)
    unnamed = run.run_dir is None
    if unnamed:
        name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = dataclasses.replace(run, run_dir=RUNS / name)
    return Job(dataclasses.replace(config, run=run), unnamed)


def _require_same(resume: str, found: Path, wanted: Path | None) -> None:
    """Raises ValueError if a run is to be resumed in another folder."""
    if resume in ("", AUTO) or wanted is None or found.resolve() == wanted.resolve():
        return
    raise ValueError(
        f"run_dir must be {found}, the folder of --resume {resume}, got {wanted}: leave out "
        f"--run-dir, or copy {found} to {wanted} and give --resume {wanted}"
    )


def load_run_config(folder: Path) -> TrainConfig:
    """The configuration of a run folder. Raises what `load_config` raises, and ValueError for a
    damaged file."""
    check_text_seal(folder / CONFIG)
    return load_config(folder / CONFIG)


def check_folder(config: TrainConfig) -> None:
    """Raises ValueError if a new job would write into another run's folder."""
    folder = config.run.run_dir
    assert folder is not None
    holds_run = (folder / METRICS).exists() or any((folder / CHECKPOINTS).glob("step-*"))
    if config.run.resume is None and holds_run:
        raise ValueError(
            f"run_dir must be a folder without a run, got {folder}: continue its run with --resume "
            f"{folder}, or choose another folder"
        )


# -------------------------------------------------------------------------- locking the folder

HELD = "FOMOE_HELD"
"""Environment variable: the name of the job that holds the folder, for the job's processes."""


class Claim(NamedTuple):
    """A run folder that this process has locked. made: whether it created the folder."""

    config: TrainConfig
    held: Held
    made: bool


def claim(job: Job) -> Claim:
    """Creates and locks the run folder, or another one if it exists and the user did not choose it.

    For the first process of a job; the others call `join_folder`. Raises InUse, which names the
    holder of the folder, ValueError if the folder has another run, and OSError.
    """
    config = job.config
    first, made = config.run.run_dir, False
    assert first is not None
    for number in itertools.count(2):
        folder = config.run.run_dir
        assert folder is not None
        made = _make(folder)
        if made or not job.unnamed:
            break
        another = first.with_name(f"{first.name}-{number}")
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=another))
    held = hold(folder, "run_dir")
    try:
        check_folder(config)
    except BaseException:
        held.release()
        raise
    return Claim(config, held, made)


def join_folder(folder: Path, job: str | None) -> Held:
    """Locks a run folder as a further process of a job. Raises InUse if another job has it."""
    _make(folder)
    return hold(folder, "run_dir", job)


def _make(folder: Path) -> bool:
    """Creates the folder; returns whether it was missing. Raises OSError naming the argument."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        return True
    except OSError as error:
        if folder.is_dir():
            return False
        raise type(error)(error.errno, f"run_dir {folder}: {error.strerror}") from None


@contextmanager
def claimed(job: Job) -> Iterator[TrainConfig]:
    """Locks the run folder for this process and those that it starts, which find the job's name in
    the environment. Removes a new folder that stays unused. Raises what `claim` raises."""
    mine = claim(job)
    before = os.environ.get(HELD)
    os.environ[HELD] = mine.held.job
    try:
        yield mine.config
    finally:
        if before is None:
            del os.environ[HELD]
        else:
            os.environ[HELD] = before
        release(mine)


def release(mine: Claim) -> None:
    """Unlocks a run folder; removes one that was created here and has no output."""
    folder, held = mine.config.run.run_dir, mine.held
    assert folder is not None
    logs = folder / "logs"
    files = list(logs.glob("*"))
    others = [path for path in folder.iterdir() if path not in (held.path, logs)]
    if not mine.made or others or any(path.stat().st_size for path in files):
        held.release()
        return
    try:
        for path in files:
            path.unlink()
        if logs.is_dir():
            logs.rmdir()
        held.release(remove=True)
        folder.rmdir()
    except OSError:  # for example, another job uses it by now
        held.release()
