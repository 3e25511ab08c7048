"""Benchmarks run as commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str) -> str:
    """Output of Python in the repository's root. Scripts find their neighbours, as for users."""
    dropped = {"FOMOE_EXPERTS_TILE"} | (set() if arguments[0] == "-m" else {"PYTHONSAFEPATH"})
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
