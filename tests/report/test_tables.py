"""Tables at any width: every figure stands whole on a line, every word whole somewhere."""

from __future__ import annotations

import io
import re
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import full_report, sample_records, sample_report
from rich.console import Console

from fomoe_ext.config.io import parse_args
from fomoe_ext.config.links import parse_link
from fomoe_ext.eval.command import eval_table
from fomoe_ext.info import collect_info, info_table
from fomoe_ext.plan.fit import fit_candidates, fit_table
from fomoe_ext.plan.report import make_plan, plan_tables
from fomoe_ext.report.compare import comparison_tables
from fomoe_ext.report.course import Course, course_of
from fomoe_ext.report.report import report_tables
from fomoe_ext.report.run_log import RunLog, progress_lines
from fomoe_ext.report.stored import StoredRun
from fomoe_ext.report.tables import (
    PLAIN_WIDTH,
    ReportTable,
    markdown_table,
    print_tables,
    site_rows,
    table_lines,
)

WIDTHS = [60, 80, 120, PLAIN_WIDTH]


def stands_in(cell: str, text: str) -> bool:
    """Whether a cell stands in a text with nothing but spaces beside it."""
    return re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", text) is not None


def check_whole(table: ReportTable, width: int) -> None:
    lines = table_lines(table, width)
    text = "\n".join(line.text for line in lines)
    assert "…" not in text
    for row in table.rows:
        for i, cell in enumerate(row):
            pieces = cell.split() if i in table.texts else [cell]
            for piece in pieces:
                assert stands_in(piece, text), (piece, text)
    for words in (table.title, table.note, *table.columns):
        for word in words.split():
            assert stands_in(word, text), (word, text)
    # A label and one figure stand side by side, however long they are.
    labels = [table.columns[0], *(row[0] for row in table.rows)]
    first = max(len(word) for label in labels for word in ["", *label.split()])
    others = [cell for row in [table.columns, *table.rows] for cell in row[1:]]
    widest = max(first + 2 + max(map(len, others), default=0), width)
    assert all(len(line.text) <= widest for line in lines), lines


def plan_of(*flags: str) -> list[ReportTable]:
    config, link = parse_args(flags), parse_link("1gbit,50ms")
    tables = plan_tables(make_plan(config, link, 1e14))
    return [*tables, fit_table(fit_candidates(config, 1e8, link, 1e14), 1e8)]


def evaluated(skipped: float | None, others: int) -> ReportTable:
    result = {"loss": 1.25, "perplexity": 123456.0, "bits_per_byte": 1.8, "tokens": 524288}
    results = [{**result, "name": "global model", "skipped_share": 0.0}]
    results += [
        {**result, "name": f"site {site} alone", "skipped_share": skipped} for site in range(others)
    ]
    figures = {"model": "runs/tiny", "round": 192, "seq_len": 128, "data": "12 files"}
    return eval_table(figures | {"results": results})


@lru_cache(maxsize=1)
def all_tables() -> dict[str, list[ReportTable]]:
    """The tables of every command."""
    course = course_of(sample_records())
    runs = {
        name: StoredRun(None, sample_report(num_sites=3), course, parse_args(flags))
        for name, flags in (("first-run", []), ("another-run", ["--codec=int2", "--sites=8"]))
    }
    return {
        "report": report_tables(full_report(), course),
        "small report": report_tables(sample_report(), Course([], [])),
        "many layers": report_tables(sample_report(4, 30, 4)),
        "plan": plan_of(),
        "plan of many sites": plan_of(
            *("--preset", "153m", "--sites", "8", "--replication", "4", "--ranks-per-site", "2"),
        ),
        "eval": [evaluated(0.25, 3), evaluated(0.0, 3), evaluated(None, 1), evaluated(None, 0)],
        "info": [info_table(collect_info())],
        "comparison": comparison_tables(runs),
    }


COMMANDS = ["report", "small report", "many layers", "plan", "plan of many sites", "eval", "info"]


@pytest.mark.parametrize("width", sorted(set(WIDTHS)))
@pytest.mark.parametrize("command", [*COMMANDS, "comparison"])
def test_no_table_of_a_command_is_cut(command, width):
    for table in all_tables()[command]:
        check_whole(table, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_on_its_way_to_a_terminal_or_a_file(width, monkeypatch):
    tables = all_tables()["report"]
    wanted = [line.text for table in tables for line in table_lines(table, width)]
    monkeypatch.setenv("COLUMNS", str(width))
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
        print_tables(tables, console)
        printed = [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]
        assert printed == [line for line in wanted if line]


def test_without_a_terminal_lines_have_a_width_of_their_own(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    row = tuple(f"{number}" * 6 for number in range(10))
    table = ReportTable("t", ("", *("abcdefghi")), (row,))
    file = io.StringIO()
    print_tables([table], Console(file=file))
    assert "   ".join(row) in file.getvalue()  # 87 characters, on one line


WORD = st.text("abcdef0123456789.%", min_size=1, max_size=14)
WORDS = st.lists(WORD, max_size=8).map(" ".join)


@st.composite
def some_tables(draw):
    columns, rows = draw(st.integers(1, 12)), draw(st.integers(0, 9))
    texts = draw(st.sets(st.integers(1, columns), max_size=2)) | {0}
    texts = tuple(sorted(i for i in texts if i < columns))
    row = st.tuples(*(WORDS if i in texts else WORD for i in range(columns)))
    heads = draw(st.tuples(*(WORDS for _ in range(columns))))
    return ReportTable(draw(WORDS), heads, tuple(draw(row) for _ in range(rows)), "", texts)


@given(some_tables(), st.integers(20, 140))
def test_no_table_is_cut(table, width):
    check_whole(table, width)


def test_a_table_that_is_too_wide_wraps_heads_then_swaps_then_continues_below():
    heads = ("", "sent by a site", "full replica", "local steps")
    row = ("this job", "1.03 MB", "13.6 MB", "12.5 ms")
    table = ReportTable("", heads, (row,) * 2)
    shown = lambda table, width: [line.text for line in table_lines(table, width)][1:]
    assert shown(table, 60)[0] == "           sent by a site   full replica   local steps"
    assert shown(table, 40)[:2] == [
        "           sent by      full     local",
        "            a site   replica     steps",
    ]
    assert shown(table, 34) == [
        "                    this      this",
        "                     job       job",
        "─" * 34,
        "sent by a site   1.03 MB   1.03 MB",
        "full replica     13.6 MB   13.6 MB",
        "local steps      12.5 ms   12.5 ms",
    ]
    many = shown(table._replace(rows=(row,) * 9), 28)
    assert many.count("") == 1 and sum(line.startswith("this job") for line in many) == 18


def test_sites_with_equal_figures_share_a_row():
    assert site_rows({0: ("a",), 1: ("a",), 2: ("a",)}) == [("each site", "a")]
    cells = {0: ("a",), 1: ("b",), 2: ("a",), 3: ("a",), 4: ("a",), 7: ("a",)}
    assert site_rows(cells, "to ") == [("to sites 0, 2-4, 7", "a"), ("to site 1", "b")]
    assert site_rows({0: ("a",)}) == [("site 0", "a")]


def test_markdown_aligns_words_left_and_numbers_right():
    table = ReportTable("t", ("", "a", "b"), (("x", "1", "y"),), "n", texts=(0, 2))
    assert markdown_table(table).splitlines()[2:] == [
        *("|  | a | b |", "|---|---:|---|", "| x | 1 | y |", "", "n")
    ]


# ---- the live line -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("seconds", [None, 5.0, 3723.0, 400_000.0])
def test_the_time_left_is_whole_in_the_live_line(width, seconds):
    note = ["loss 5.123", "40.1k tok/s", "skipped 25%", "sent 1.03 MB/site"]
    lines = progress_lines((67, 12_345), seconds, note, width)
    left = {None: "-:--:--", 5.0: "0:00:05", 3723.0: "1:02:03", 400_000.0: "111:06:40"}[seconds]
    for part in ("training", "67/12345", left, *note):
        assert any(part in line for line in lines), (part, lines)
    assert all(len(line) <= width for line in lines)
    assert len(lines) == (1 if width >= 120 else len(lines))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_line_on_a_terminal(width, tmp_path):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    record = {"round": 1, "step": 2, "loss": 5.0, "lr": 1e-3, "tokens_per_s": 123_456.0}
    record |= {"skipped_share": 0.25, "bytes_sent": 1_030_000, "meeting_s": 0.1}
    with RunLog(tmp_path, total_rounds=9, local_steps=2, tensorboard=False, console=console) as log:
        log.step(1, lambda: 5.0, 123_456.0)
        log.round(record)
        log._shown = 0.0
        log.step(3, lambda: 4.0, 123_456.0)
    said = file.getvalue()
    assert "…" not in said and re.search(r"\d:\d\d:\d\d|-:--:--", said)
    assert all(part in said for part in ("3/18", "loss 4.000", "skipped 25%", "sent 1.03 MB/site"))


def test_a_round_that_skipped_and_sent_nothing_does_not_say_so(tmp_path):
    file = io.StringIO()
    record = {"round": 1, "step": 2, "loss": 5.0, "lr": 1e-3, "tokens_per_s": 1e3, "meeting_s": 0.1}
    with RunLog(
        tmp_path, total_rounds=9, local_steps=2, tensorboard=False, console=Console(file=file)
    ) as log:
        log.round(record | {"skipped_share": 0.0, "bytes_sent": 0})
    (line,) = file.getvalue().splitlines()
    assert line == "round    1/9  loss 5.0000  lr 1.00e-03  1k tok/s  meeting 0.10 s"


def test_the_cost_of_an_evaluation_is_that_of_what_it_lacks():
    assert evaluated(0.25, 2).columns[-1] == "cost of skipping"
    fewer = evaluated(0.0, 2)
    assert fewer.columns[-1] == "cost of fewer experts" and "No slot is skipped" in fewer.note
