"""Host time of a small MoELayer, and the operators that it dispatches.

    pytest bench -k host --benchmark-only
    FOMOE_HOST_AGAINST=<other source tree, built> pytest bench -k host --benchmark-only

Processor time of a forward and of a backward pass on tiny tensors (host_cases.py), the least of
several processes. With FOMOE_HOST_AGAINST processes of that tree's package alternate with ours, and
the table shows our time over theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import host_cases
from rich.console import Console
from rich.table import Table

import fomoe_ext

PROCESSES = 3
PASSES = ("forward", "backward")
_OURS = Path(fomoe_ext.__file__).resolve().parents[1]

results: dict[str, dict[str, Any]] = {}
Seconds = dict[str, dict[str, float]]


def measured(tree: Path) -> Seconds:
    """`host_cases` in a process with the package of a source tree."""
    command = [sys.executable, str(Path(host_cases.__file__).resolve())]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tree)
    if done.returncode:
        raise RuntimeError(
            f"host_cases.py with the package of {tree} failed: {done.stderr[-2000:]}"
        )
    found: Seconds = json.loads(done.stdout.splitlines()[-1])
    return found


def least(rounds: list[Seconds], case: str, name: str) -> float:
    return min(seconds[case][name] for seconds in rounds)


def test_host_time_of_a_layer(benchmark: Any) -> None:
    """All cases, in processes of ours and, if there are any, theirs in turn."""
    against = os.environ.get("FOMOE_HOST_AGAINST")
    ours: list[Seconds] = []
    theirs: list[Seconds] = []

    def one_round() -> None:
        ours.append(measured(_OURS))
        if against:
            theirs.append(measured(Path(against)))

    benchmark.pedantic(one_round, rounds=PROCESSES)
    for case, options in host_cases.CASES.items():
        counted = host_cases.operators(host_cases.Pass(options))
        found: dict[str, Any] = {name: least(ours, case, name) for name in PASSES}
        if theirs:
            found["against"] = {name: least(theirs, case, name) for name in PASSES}
        found |= {"operators": counted.dispatched, "computing": counted.computing}
        results[case] = found | {"recorded": counted.recorded}
    benchmark.extra_info["host"] = results
    assert all(found["operators"] >= found["computing"] > 0 for found in results.values())


def show(console: Console) -> None:
    """Prints the results, if there are any."""
    if not results:
        return
    table = Table(title="host time of a small layer, and operators of forward + backward")
    table.add_column("case")
    for name in ("forward us", "backward us", "operators", "computing", "recorded", "over theirs"):
        table.add_column(name, justify="right")
    for case, found in results.items():
        ratio = "-"
        if theirs := found.get("against"):
            ratio = f"{sum(found[n] for n in PASSES) / sum(theirs[n] for n in PASSES):.2f}"
        table.add_row(
            case,
            *(f"{found[name] * 1e6:.0f}" for name in PASSES),
            *(str(found[name]) for name in ("operators", "computing", "recorded")),
            ratio,
        )
    console.print(table)
    console.print("recorded: all that the profiler sees, also what an operator calls inside.")
