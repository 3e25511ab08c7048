"""Python processes that tests start with a script of their own."""

from __future__ import annotations

import os
import subprocess
import sys

from fomoe_ext import _C

OTHER_ISAS = [n for n in _C.cpu_features()["available"] if n != _C.cpu_features()["chosen"]]
"""Instruction sets of this machine but the one that the kernels run with."""


def environment(**changes: str) -> dict[str, str]:
    """The environment in which a new process can import the package, helpers and test modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}


def told_with_isa(isa: str, code: str) -> str:
    """The output of a script that runs with another instruction set."""
    forced = f"from fomoe_ext import _C\nassert _C.cpu_features()['chosen'] == {isa!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", forced + code],
        env=environment(FOMOE_CPU_ISA=isa),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
