"""Makes the runs that are not recorded yet, one after the other."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.study import design, pool, store
from bench.study.store import Run


def machine_facts() -> dict[str, Any]:
    """Instruction set, commit and versions (`bench/machine.py`)."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import machine

    return machine.Watch("cpu").facts()


def _train(run: Run, path: Path) -> dict[str, Any]:
    """Runs a job. A flag that is "counted" gets the counts that `design.counted` recorded."""
    by = [name for name in ("placement_by", "stale_by") if run.flags.get(name) == "counted"]
    if not by:
        return pool.train(run.arguments(), run.sites)
    kept = store.load(path).get(design.counted_for(run).key)
    if kept is None:
        raise pool.RunFailed(
            "no run is recorded that counts how often experts are chosen together (coactivation)"
        )
    # The diagonal: how often each expert is chosen.
    load = [[row[expert] for expert, row in enumerate(layer)] for layer in kept["coactivation"]]
    with tempfile.TemporaryDirectory(prefix="fomoe-study-") as folder:
        counts = Path(folder) / "counts.json"
        counts.write_text(json.dumps(load if "stale_by" in by else kept["coactivation"]))
        return pool.train(run.named(**dict.fromkeys(by, counts)).arguments(), run.sites)


def run_missing(
    name: str,
    runs: Iterable[Run],
    path: Path = store.RUNS,
    *,
    train: Callable[[Run], dict[str, Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Makes the runs that the file lacks and records each as it ends; returns how many failed.

    `train` makes a run and returns its report, as `pool.train` does, on whose CPU runs are made
    unless it is given. `facts`: of the machine, by default `machine_facts`.
    """
    todo = store.missing(runs, path)
    if not todo:
        return 0
    facts = machine_facts() if facts is None else facts
    train = train or partial(_train, path=path)
    failed, start = 0, time.perf_counter()
    for number, run in enumerate(todo, 1):
        told = {k: v for k, v in run.flags.items() if design.BASE.get(k) != v}
        print(f"{name} [{number}/{len(todo)}] {run.sites} sites, seed {run.seed}, {told}", end=" ")
        sys.stdout.flush()
        try:
            report = train(run)
        except pool.RunFailed as error:
            failed += 1
            print(f"failed\n{error}", flush=True)
            continue
        store.append(store.record(run, report, facts), path)
        each = (time.perf_counter() - start) / number
        print(
            f"loss {report['validation']['loss']:.4f} in {report['job_s']:.0f} s, "
            f"{each * (len(todo) - number) / 60:.0f} min to go",
            flush=True,
        )
    return failed
