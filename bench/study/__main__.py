"""`python -m bench.study TABLE` makes the runs that a table of the study lacks and prints it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.study import claims, design, run, store, tables, throughput
from fomoe_ext.report.tables import print_tables

QUICK_RUNS = store.RUNS.with_name("quick.jsonl")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study",
        description="Makes the training runs that a table lacks, then prints the table.",
    )
    kinds = [*tables.TABLES, "throughput", "claims", "all"]
    parser.add_argument(
        "table",
        choices=kinds,
        help="claims: write docs/claims.md from the recorded runs; all: every table, then claims",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few short runs, recorded in another file; docs/claims.md is not written",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="seeds 0 .. N-1 only (default: 3, --quick: 1)"
    )
    parser.add_argument("--show", action="store_true", help="print recorded runs, make no new ones")
    parser.add_argument(
        "--out", type=Path, help=f"file where runs are recorded (default: {store.RUNS.name})"
    )
    return parser.parse_args(arguments)


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
        if name == "throughput":
            if not given.show:
                throughput.run(3 if given.quick else 15, run.machine_facts(), timed)
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
