"""`fomoe report` and its page: whole, alone in one file, and shown by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_samples import full_report, sample_records, sample_report
from small_run import finished_run

from fomoe_ext import cli
from fomoe_ext.extras import NotInstalled
from fomoe_ext.files.unwritten import Unwritten
from fomoe_ext.report import page
from fomoe_ext.report.course import Course, course_of
from fomoe_ext.report.page import report_page, write_page
from fomoe_ext.report.report import known_course, report_tables

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
_PLAIN = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
_QUIET = "--disable-background-networking --disable-component-update"


class Page(HTMLParser):
    """The tags of a page that could fetch something, its ids, and what is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            outside = name in ("href", "src", "srcset", "action", "data")
            if outside and not value.startswith(("#", "data:")):
                self.fetched.append(value)


def check_page(text: str) -> ElementTree.Element:
    """A page of one file, well-formed, whose references are to what it holds."""
    parsed = Page(text)
    assert not parsed.open and not parsed.fetched
    assert not parsed.tags & {"script", "link", "iframe", "object", "img"}
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "http:" not in text and "https:" not in text and "@import" not in text
    targets = set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
    assert targets <= set(parsed.ids)
    assert "#0000" not in text  # every colour is one of the page's
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", text)) <= set(
        re.findall(r"--([a-z0-9]+):", text)
    )
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words_of(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


REPORTS = {
    "small": (sample_report(), Course([], [])),
    "full": (full_report(), course_of(sample_records())),
    "many": (sample_report(256, 12, 32, equal=False), course_of(sample_records(300, 32))),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_holds_every_cell_of_every_table(name):
    report, course = REPORTS[name]
    root = check_page(report_page(report, course))
    tables = report_tables(report, course)
    shown = [
        [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
        for table in root.iter("table")
    ]
    for table, rows in zip(tables, shown, strict=True):
        heads = [list(table.columns)] if any(table.columns) else []
        assert rows == heads + [list(row) for row in table.rows]
    drawings = [svg.get("aria-label") for svg in root.iter("svg")]
    losses = ["Loss by tokens"] if course.training else []
    more = ["Bytes sent by a site", "Time of each site", "Load per expert and layer"]
    assert drawings == losses + more
    assert "prefers-color-scheme: dark" in words_of(root)


def test_points_and_cells_say_what_they_are():
    report, course = REPORTS["full"]
    root = check_page(report_page(report, course))
    titles = {"".join(title.itertext()) for svg in root.iter("svg") for title in svg.iter("title")}
    loss = course.validation[1].loss
    assert f"round 20: {loss:.4f} nats per token, {loss * 1.44:.3f} bits per byte" in titles
    assert "layer 2, expert 63: 1.94 of an even share" in titles
    assert "site 1, recovery: 2.0 s" in titles


def test_names_are_text_and_no_markup():
    report = sample_report()
    report["run"] |= {"name": "<script>x</script>", "data": "a & b"}
    root = check_page(report_page(report, Course([], [])))
    assert "<script>x</script>" in words_of(root) and "a & b" in words_of(root)


# ---- the command ---------------------------------------------------------------------------------


def test_the_report_of_a_folder_is_that_of_the_end_of_the_job(capsys, monkeypatch):
    run = finished_run()
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    for table in report_tables(report, known_course(run)):
        assert table.title in shown
        assert all(cell in shown for row in table.rows for cell in row if len(cell) < 20)
    checkpoint = next((run / "checkpoints").iterdir())
    assert cli.main(["report", str(checkpoint)]) == 0
    assert capsys.readouterr().out == shown


def test_a_job_leaves_the_page_that_the_command_writes(tmp_path, capsys):
    run = finished_run()
    file = tmp_path / "folder" / "page.html"
    assert cli.main(["report", str(run), "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"page in {file}\n"
    text = file.read_text(encoding="utf-8")
    check_page(text)
    assert text == (run / "report.html").read_text(encoding="utf-8")


def test_the_page_of_a_run_has_a_place_of_its_own(tmp_path, capsys, monkeypatch):
    run = tmp_path / "runs" / "mine"
    shutil.copytree(finished_run(), run, ignore=shutil.ignore_patterns("checkpoints", "*.html"))
    monkeypatch.chdir(tmp_path)
    for words in (["--html", str(run)], [str(run), "--html"], ["--html"]):  # the newest in runs/
        assert cli.main(["report", *words]) == 0
        (run / "report.html").unlink()
    assert cli.main(["report", str(run), str(finished_run()), "--html"]) == 0
    assert capsys.readouterr().out.endswith("page in comparison.html\n")
    root = check_page(Path("comparison.html").read_text(encoding="utf-8"))
    drawings = [svg.get("aria-label") for svg in root.iter("svg")]
    assert drawings == ["Loss against bytes", "Loss against tokens"]


def test_runs_side_by_side_with_what_differs_between_them(tmp_path, capsys, monkeypatch):
    run, other = finished_run(), tmp_path / "another"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints"))
    config = (run / "config.toml").read_text().split("\n", 1)[1]  # without its seal
    (other / "config.toml").write_text(re.sub(r'codec = "fp32"', 'codec = "int4"', config))
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["report", str(run), str(other)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^outer\.codec +fp32 +int4$", shown, re.MULTILINE), shown
    assert "local_steps" not in shown and re.search("^another ", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run), "does not exist"),
        (lambda run: (run / "report.json").unlink(), "its last round so far is 6, with a training"),
        (lambda run: (run / "report.json").write_text("{"), "report.json"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl, line 1"),
        (
            lambda run: [file.unlink() for file in run.glob("*.json*")],
            "run must be a run folder with report.json, got ",
        ),
    ],
    ids=["no folder", "not finished", "damaged", "damaged metrics", "no run"],
)
def test_what_is_no_finished_run_is_refused(change, message, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run(), run, ignore=shutil.ignore_patterns("checkpoints"))
    change(run)
    assert cli.main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert message in said and str(run) in said and said.count("\n") == 1


def test_without_any_run_one_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 2
    assert "RUN must be given: there is no run in runs/" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_page_needs_an_extra_and_a_job_does_not(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    report, course = REPORTS["full"]
    with pytest.raises(NotInstalled, match=rf"a report in HTML needs {package}: pip install"):
        report_page(report, course)
    unwritten = Unwritten()
    assert write_page(tmp_path, report, unwritten) is None
    assert not unwritten.entries() and not list(tmp_path.iterdir())
    assert cli.main(["report", str(finished_run()), "--html", str(tmp_path / "x.html")]) == 2
    assert "fomoe-ext[plot]" in capsys.readouterr().err


def test_a_drawing_that_fails_does_not_fail_the_job(tmp_path, monkeypatch, caplog):
    def broken(*arguments):
        raise ZeroDivisionError("no axes")

    monkeypatch.setattr(page, "time_plot", broken)
    unwritten = Unwritten()
    assert write_page(tmp_path, sample_report(), unwritten) is None
    assert "report.html: ZeroDivisionError: no axes" in caplog.text and not unwritten.entries()
    monkeypatch.undo()
    (tmp_path / "report.html").mkdir()
    assert write_page(tmp_path, sample_report(), unwritten) is None
    assert "report.html" in unwritten.entries()[0]


# ---- a real browser ------------------------------------------------------------------------------


@pytest.mark.skipif(not BROWSER, reason="needs chromium or google-chrome")
def test_a_browser_shows_the_page(tmp_path):
    file = tmp_path / "page.html"
    report, course = REPORTS["full"]
    # Writes down what the browser has made of the page.
    probe = """<script>
      const all = [...document.querySelectorAll('svg, table')];
      const boxes = all.map(e => e.getBoundingClientRect());
      document.title = JSON.stringify({
        boxes: boxes.map(b => [b.width, b.height]), wide: document.documentElement.scrollWidth,
        font: getComputedStyle(document.querySelector('svg text')).fontFamily,
        ink: getComputedStyle(document.querySelector('svg text')).fill});
    </script></body>"""
    file.write_text(report_page(report, course).replace("</body>", probe), encoding="utf-8")
    words = [BROWSER, *_PLAIN.split(), *_QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--window-size=1160,900", "--dump-dom", file.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
    seen = json.loads(found)
    assert len(seen["boxes"]) == 4 + len(report_tables(report, course))
    assert all(width > 200 and height > 60 for width, height in seen["boxes"])
    assert seen["wide"] <= 1160  # nothing sticks out of the page
    assert "system-ui" in seen["font"] and seen["ink"].startswith("rgb(")
