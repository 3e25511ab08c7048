"""Runs many short training jobs on one machine without importing torch for each.

As with `fomoe train`, each site is a process that runs `fomoe_ext.train.process.main` with
torchrun's environment variables. Here these are forked from a server that has imported everything.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from fomoe_ext.launch.processes import EXIT_PEER_LOST, process_environment
from fomoe_ext.report.metrics import read_metrics

TAIL_LINES = 15
_PRELOAD = ["fomoe_ext.train.process"]


class RunFailed(RuntimeError):
    """A training job failed; the message has the end of its output."""


def _site(arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    threading.Thread(target=_end_with_study, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from fomoe_ext.train import process as train

    sys.exit(train.main(arguments))


def _end_with_study() -> None:
    study = mp.parent_process()
    assert study is not None
    study.join()
    os._exit(EXIT_PEER_LOST)


def _start(
    arguments: Sequence[str], num_sites: int, folder: Path
) -> tuple[list[ForkServerProcess], list[Path]]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    base = {"OMP_NUM_THREADS": "1"}
    logs = [folder / f"site-{site}.log" for site in range(num_sites)]
    processes = []
    for site, log in enumerate(logs):
        environment = process_environment(site, num_sites, f"file://{folder}/store", base)
        environment.pop("PYTHONPATH")
        process = context.Process(
            target=_site, args=(list(arguments), environment, str(log)), daemon=True
        )
        process.start()
        processes.append(process)
    return processes, logs


def train(arguments: Sequence[str], num_sites: int, device: str = "cpu") -> dict[str, Any]:
    """Runs `fomoe train` with these flags and `num_sites` sites of one thread each.

    Returns its report, with two more items: "metrics", the lines of metrics.jsonl, and "job_s", the
    seconds from the start of the processes to the end of the last one. Raises RunFailed.
    """
    with tempfile.TemporaryDirectory(prefix="fomoe-study-") as name:
        folder, start = Path(name), time.perf_counter()
        run_dir = folder / "run"
        words = [*arguments, "--sites", str(num_sites), "--threads", "1", "--no-tensorboard"]
        words += ["--run-dir", str(run_dir), "--device", device]
        processes, logs = _start(words, num_sites, folder)
        _wait(processes)
        failed = [site for site, process in enumerate(processes) if process.exitcode]
        if failed:
            tail = "\n".join(logs[failed[0]].read_text(errors="replace").splitlines()[-TAIL_LINES:])
            codes = [processes[site].exitcode for site in failed]
            raise RunFailed(f"sites {failed} ended with {codes}: {' '.join(words)}\n{tail}")
        report = json.loads((run_dir / "report.json").read_text())
        report["metrics"] = read_metrics(run_dir / "metrics.jsonl")
        report["job_s"] = time.perf_counter() - start
        return report


def _wait(processes: Sequence[ForkServerProcess]) -> None:
    """Waits until all have ended. When one fails it ends the others."""
    running = list(processes)
    try:
        while running:
            wait([process.sentinel for process in running])
            running = [process for process in running if process.is_alive()]
            if any(p.exitcode for p in processes if p not in running):
                break
    finally:
        for process in running:
            process.kill()
        for process in processes:
            process.join()
