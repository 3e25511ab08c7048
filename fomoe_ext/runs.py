"""Run folders: where a job writes, and which one it continues. Needs no torch.

<run>/config.toml                the resolved configuration
<run>/metrics.jsonl              a line per round and validation
<run>/tensorboard/               the same for TensorBoard
<run>/checkpoints/step-00000640/ see `fomoe_ext.checkpoint`
<run>/logs/site-1.log            what the sites but the first had to say (local launch)
<run>/report.md, report.json     at the end
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from fomoe_ext.config import TrainConfig
from fomoe_ext.config_io import parse_args

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
RUNS = Path("runs")


def _flag_value(args: Sequence[str], flag: str) -> str | None:
    """The last value of `--flag VALUE` or `--flag=VALUE`; "" where the flag stands alone."""
    value = None
    for i, arg in enumerate(args):
        if arg == flag:
            bare = i + 1 == len(args) or args[i + 1].startswith("--")
            value = "" if bare else args[i + 1]
        elif arg.startswith(flag + "="):
            value = arg.partition("=")[2]
    return value


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


def job_config(args: Sequence[str], prog: str = "fomoe train") -> TrainConfig:
    """The configuration of a job from its arguments, with run folder and what it resumes settled.

    A resumed job takes the configuration saved with its run, unless --config or --preset is given;
    other flags change it. `--resume auto` of a run folder that does not exist yet, or of none where
    there is no run, begins the job. Raises what `config_io.parse_args` raises, and
    FileNotFoundError where a run that was named is not there.
    """
    args = list(args)
    resume, given = _flag_value(args, "--resume"), _flag_value(args, "--run-dir")
    known: Path | None = Path(given) if given else None
    if resume is not None and not any(_flag_value(args, f) for f in ("--config", "--preset")):
        found = _run_to_resume(resume, known)
        if found is not None and (found / CONFIG).is_file():
            args += ["--config", str(found / CONFIG)]
            known = known or found  # wherever it was when it was saved
        elif resume not in ("", AUTO):
            raise FileNotFoundError(f"--resume: {found} is no run folder, it has no {CONFIG}")
    config = parse_args(args, prog)
    run = config.run
    if run.resume is not None:
        automatic = run.resume in ("", AUTO)
        folder = known or _run_to_resume(run.resume, run.run_dir)
        run = dataclasses.replace(run, resume=AUTO if automatic else run.resume, run_dir=folder)
    if run.run_dir is None:
        name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = dataclasses.replace(run, run_dir=RUNS / name)
    return dataclasses.replace(config, run=run)


def check_folder(config: TrainConfig) -> None:
    """Raises ValueError when a job that resumes nothing would write into another run's folder."""
    folder = config.run.run_dir
    assert folder is not None
    if config.run.resume is None and (folder / METRICS).exists():
        raise ValueError(
            f"run_dir {folder} holds a run already: continue it with --resume {folder}, or name "
            "another folder"
        )
