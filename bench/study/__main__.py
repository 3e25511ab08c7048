"""`python -m bench.study TABLE` makes the runs that a table of the study lacks and prints it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.study import claims, design, proxy, run, store, tables, throughput
from fomoe_ext.report.tables import print_tables

QUICK_RUNS = store.RUNS.with_name("quick.jsonl")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study",
        description="Makes the training runs that a table lacks, then prints the table.",
    )
    kinds = [*tables.TABLES, "throughput", "gpu", "claims", "all"]
    parser.add_argument(
        "table",
        choices=kinds,
        help="gpu: the paper's proxy sizes, all sites on one GPU; claims: write docs/claims.md "
        "from the recorded runs; all: every table that the CPU can make, then claims",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few short runs, recorded in another file; docs/claims.md is not written",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="seeds 0 .. N-1 only (default: 3, --quick: 1)"
    )
    parser.add_argument(
        "--minutes", type=float, default=60, help="of table gpu, for all its runs (default: 60)"
    )
    parser.add_argument("--show", action="store_true", help="print recorded runs, make no new ones")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"file where runs are recorded (default: {store.RUNS.name}; gpu: {proxy.RUNS.name})",
    )
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes must be > 0, got {given.minutes:g}")
    return given


def _gpu(given: argparse.Namespace, console: Console) -> int:
    """Table gpu; returns how many runs failed."""
    import torch

    device = "cpu" if given.quick else "cuda"
    path = given.out or (proxy.RUNS.with_name("quick-gpu.jsonl") if given.quick else proxy.RUNS)
    failed = 0
    if not given.show:
        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(
                "python -m bench.study gpu needs a GPU; --quick tries it on the CPU, --show "
                "prints what is recorded"
            )
        seeds = range((1 if given.quick else 3) if given.seeds is None else given.seeds)
        failed = proxy.run_all(given.minutes, device, seeds, run.machine_facts(), path)
    print_tables(proxy.table(path), console)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a run failed, else 0."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    size = design.QUICK if given.quick else design.FULL
    path = given.out or (QUICK_RUNS if given.quick else store.RUNS)
    timed = throughput.RESULT if not given.quick else path.with_name("quick-throughput.json")
    start, failed = time.perf_counter(), 0
    console = Console(width=None if sys.stdout.isatty() else 150)
    made = size if given.seeds is None else design.with_seeds(size, given.seeds)
    for name in [*tables.TABLES, "throughput"] if given.table == "all" else [given.table]:
        if name == "claims":
            continue
        if name == "gpu":
            failed += _gpu(given, console)
            continue
        if name == "throughput":
            if not given.show:
                repeats = 3 if given.quick else 15
                throughput.run(repeats, run.machine_facts(), timed, sizes=given.quick)
            print_tables(throughput.throughput_table(timed), console)
            continue
        if not given.show:
            failed += run.run_missing(name, design.runs_of(name, made), path)
        print_tables(tables.TABLES[name](store.load(path), size), console)
    if given.table in ("all", "claims") and not given.quick:
        claims.write(path)
        print(f"{claims.DOCS / 'claims.md'} written")
    print(f"{(time.perf_counter() - start) / 60:.1f} min")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
