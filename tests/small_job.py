"""Small jobs of `fomoe train`, run to their end or started in the background."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import forked

import fomoe_ext

HOME = str(Path(fomoe_ext.__file__).parent.parent)
SMALL = shlex.split("""
--hidden-size 16 --num-layers 2 --num-heads 2 --num-experts 8 --intermediate-size 8 --top-k 2
--seq-len 32 --batch-size 2 --local-steps 3 --rounds 4 --eval-rounds 2 --eval-tokens 256
--threads 1 --warmup-steps 2 --router-scope global --codec fp32
""")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": HOME, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "fomoe_ext.cli", "train", *arguments]


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `fomoe train` from a forked process, which is faster than `started`."""
    return forked.train(*arguments, env=environment())


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), timeout=120
    )


def finish(run: Path, result: subprocess.CompletedProcess[str]) -> dict:
    """The report of a job that ended well."""
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((run / "report.json").read_text())


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_and_wait_for(marker: str, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A running job that has printed `marker`, and the process ids of its sites."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if marker in line:
            return process, children(process.pid)
    raise AssertionError(f"never said {marker!r}: {process.stderr.read()}")


def require_gone(pids: list[int], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a site is still running"
        time.sleep(0.05)
