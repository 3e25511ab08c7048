"""`fomoe report`: shows the report of a finished run or compares several runs; text or HTML."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fomoe_ext.files.atomic import write_text
from fomoe_ext.files.outputs import require_file
from fomoe_ext.report.compare import comparison_tables, names_of
from fomoe_ext.report.report import print_report
from fomoe_ext.report.runs import PAGE, RUNS, newest_run
from fomoe_ext.report.stored import StoredRun, read_run
from fomoe_ext.report.tables import print_tables

COMPARISON = Path("comparison.html")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fomoe report",
        description="Show the report of a finished run, or compare several runs side by side.",
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help=f"run folder (default: newest in {RUNS}/)"
    )
    parser.add_argument(
        "--html",
        nargs="?",
        const=True,
        metavar="FILE",
        help=f"write one HTML page with plots instead (default: RUN/{PAGE}, or {COMPARISON} for "
        "several runs)",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """`fomoe report [RUN ...] [--html [FILE]]`; returns the exit code.

    Raises ValueError and OSError for a folder that is not a finished run, NotInstalled for a page
    without the extra `plot`.
    """
    given = _parser().parse_args(arguments)
    folders, html = list(given.runs), given.html
    if isinstance(html, str) and Path(html).is_dir():  # --html RUN
        folders, html = [Path(html), *folders], True
    if not folders:
        newest = newest_run()
        if newest is None:
            raise FileNotFoundError(f"RUN must be given: there is no run in {RUNS}/")
        folders = [newest]
    runs = [read_run(folder) for folder in folders]
    if html is None:
        _show(runs)
        return 0
    default = runs[0].folder / PAGE if len(runs) == 1 else COMPARISON
    _write_page(runs, default if html is True else Path(html))
    return 0


def _named(runs: Sequence[StoredRun]) -> dict[str, StoredRun]:
    return dict(zip(names_of([run.folder for run in runs]), runs, strict=True))


def _show(runs: Sequence[StoredRun]) -> None:
    console = Console(highlight=False)
    if len(runs) == 1:
        print_report(runs[0].report, console, runs[0].course)
    else:
        print_tables(comparison_tables(_named(runs)), console)


def _write_page(runs: Sequence[StoredRun], file: Path) -> None:
    from fomoe_ext.report.page import comparison_page, report_page

    require_file("--html", file)
    if len(runs) == 1:
        text = report_page(runs[0].report, runs[0].course)
    else:
        text = comparison_page(_named(runs))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    print(f"page in {file}")
