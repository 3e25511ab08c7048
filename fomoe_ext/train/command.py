"""`fomoe train`: starts one process per rank of each site on this machine. Needs no torch."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fomoe_ext.config.effects import without_effect
from fomoe_ext.config.io import flag_value, save_config
from fomoe_ext.config.links import parse_link
from fomoe_ext.fault.keeper import LighthouseKeeper
from fomoe_ext.files.unwritten import Unwritten, tolerant_output
from fomoe_ext.launch.console import outlive_terminal
from fomoe_ext.launch.processes import launch
from fomoe_ext.report.runs import CHECKPOINTS, claimed, find_job
from fomoe_ext.train.preflight import check_job


def main(arguments: Sequence[str]) -> int:
    """Starts all sites of a job and watches them until they have ended; returns the exit code.

    An error before the start is raised: ValueError, TypeError, OSError, NotInstalled, or
    ImportError if the package is not built.
    """
    outlive_terminal()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "this is a process of torchrun, and `fomoe train` starts all sites itself: with "
            "torchrun, run -m fomoe_ext.train"
        )
    job = find_job(arguments)
    for line in without_effect(job.config, arguments, flag_value(arguments, "--config")):
        print(f"fomoe train: {line}", file=sys.stderr)
    check_job(job.config)
    with claimed(job) as config, tempfile.TemporaryDirectory(prefix="fomoe-") as folder:
        run_dir = config.run.run_dir
        assert run_dir is not None
        file = Path(folder) / "config.toml"
        save_config(config, file)
        # If the launcher died of a full disk, the sites would die with it.
        with tolerant_output(Unwritten()):
            return launch(
                ["--config", str(file)],
                config.sites.sites,
                run_dir / "logs",
                None if config.sites.link is None else parse_link(config.sites.link),
                config.sites.ranks_per_site,
                checkpoints=run_dir / CHECKPOINTS,
                keeper=LighthouseKeeper(config.fault) if config.fault.tolerant else None,
            )
