"""Run folders: where a job writes, and which one it continues. Needs no torch.

<run>/.lock                      which job writes here, while it does (`folder_lock`)
<run>/config.toml                the resolved configuration, sealed (`atomic.seal_text`)
<run>/config-until-step-N.toml   that of before, where a resumed job changed it after N local steps
<run>/metrics.jsonl              a line per round and validation
<run>/tensorboard/               the same for TensorBoard
<run>/checkpoints/step-00000640/ see `fomoe_ext.checkpoint`
<run>/logs/site-1.log            what the sites but the first had to say (local launch)
<run>/report.md, report.json     at the end
<run>/report.html                the same with plots, where the extra `plot` is installed
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
"""`resume`: the newest whole checkpoint of the run folder, or the beginning where there is none."""


def newest_run(folder: Path = RUNS) -> Path | None:
    """The run folder in `folder` that was begun last, or None where there is none."""
    runs = [path.parent for path in folder.glob(f"*/{CONFIG}")] if folder.is_dir() else []
    return max(runs, key=lambda path: ((path / CONFIG).stat().st_mtime_ns, path.name), default=None)


def _run_to_resume(resume: str, run_dir: Path | None) -> Path | None:
    """The run folder of what is to be resumed; None where auto finds no run at all."""
    return (run_dir or newest_run()) if resume in ("", AUTO) else run_of(Path(resume))


class Job(NamedTuple):
    """A job's configuration, which names its run folder. `unnamed`: the user did not name one, so
    that another is taken where that one is in use."""

    config: TrainConfig
    unnamed: bool


def job_config(args: Sequence[str], prog: str = "fomoe train") -> TrainConfig:
    """The configuration of `find_job`."""
    return find_job(args, prog).config


def find_job(args: Sequence[str], prog: str = "fomoe train") -> Job:
    """A job from its arguments: its configuration with the run folder and what it resumes.

    A resumed job takes the configuration saved with its run, unless --config or --preset is given;
    other flags change it. `--resume auto` of a run folder that does not exist yet, or of none where
    there is no run, begins the job. Raises what `parse_args` raises, ValueError for a run
    that is to go on in another folder or whose configuration is damaged, and FileNotFoundError
    where a run that was named is not there.
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
            known = known or found  # wherever it was when it was saved
        elif resume not in ("", AUTO):
            raise FileNotFoundError(f"--resume: {found} is no run folder, it has no {CONFIG}")
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
    """Raises ValueError where a run is to be resumed, but in another folder."""
    if resume in ("", AUTO) or wanted is None or found.resolve() == wanted.resolve():
        return
    raise ValueError(
        f"--resume {resume} goes on in its own folder, {found}, but run_dir is {wanted}: leave out "
        f"--run-dir, or copy {found} to {wanted} and give --resume {wanted}"
    )


def load_run_config(folder: Path) -> TrainConfig:
    """The configuration of a run folder. Raises as `load_config`, and ValueError where the file is
    not what was written."""
    check_text_seal(folder / CONFIG)
    return load_config(folder / CONFIG)


def check_folder(config: TrainConfig) -> None:
    """Raises ValueError when a job that resumes nothing would write into another run's folder."""
    folder = config.run.run_dir
    assert folder is not None
    holds_run = (folder / METRICS).exists() or any((folder / CHECKPOINTS).glob("step-*"))
    if config.run.resume is None and holds_run:
        raise ValueError(
            f"run_dir {folder} holds a run already: continue it with --resume {folder}, or name "
            "another folder"
        )


# -------------------------------------------------------------------------- whose the folder is

HELD = "FOMOE_HELD"
"""Environment variable: the job that holds the run folder, of which a process is."""


class Claim(NamedTuple):
    """A run folder that this process holds; `made`: which was not there before."""

    config: TrainConfig
    held: Held
    made: bool


def claim(job: Job) -> Claim:
    """Makes the run folder, or another where it is taken and nobody named it, and holds it.

    For the first process of a job, by its launcher or alone; the others `join_folder`. Raises
    InUse, which names who has the folder, ValueError where it holds another run, and OSError.
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
    """Holds a run folder as a process of a job. Raises InUse where another job has it."""
    _make(folder)
    return hold(folder, "run_dir", job)


def _make(folder: Path) -> bool:
    """Whether the folder was not there. Raises OSError naming the argument."""
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
    """Inside, the run folder is held by this process and those that it starts, which find the job's
    name in the environment. What was made for nothing is removed again. Raises as `claim`."""
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
    """Lets go of a run folder; one that was made goes where the job has left nothing in it."""
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
    except OSError:  # another job has it by now, say
        held.release()
