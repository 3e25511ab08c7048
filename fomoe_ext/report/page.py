"""A report, or several runs side by side, as one HTML page that needs nothing else.

Needs matplotlib and jinja2 (the extra `plot`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fomoe_ext.extras import NotInstalled
from fomoe_ext.files.atomic import write_text
from fomoe_ext.files.unwritten import Unwritten
from fomoe_ext.report.compare import comparison_tables
from fomoe_ext.report.course import Course, course_of
from fomoe_ext.report.plots import against_plot, bytes_plot, load_plot, loss_plot, time_plot
from fomoe_ext.report.report import known_course, report_tables
from fomoe_ext.report.runs import PAGE
from fomoe_ext.report.stored import StoredRun
from fomoe_ext.report.tables import ReportTable
from fomoe_ext.report.units import human_bytes, human_count

_log = logging.getLogger(__name__)
_TEMPLATE = Path(__file__).with_name("page.jinja")


_NARROW, _SHORT = 76, 14
"""Most characters and rows of a table that takes half the width of the page."""
_SHADES = (
    (100, "c1", "none"),
    (50, "c1", "half"),
    (0, "c1", "even"),
    (50, "c2", "double"),
    (100, "c2", "triple and more"),
)
"""Legend of the load: percent of a colour, its name, and its meaning."""


class _Figure(NamedTuple):
    """A number at the top of a page."""

    name: str
    value: str
    about: str


class _Drawing(NamedTuple):
    """A plot in its frame. legend: percent of a colour, its name, and its meaning."""

    title: str
    svg: Any
    caption: str
    wide: bool = False
    legend: Sequence[tuple[int, str, str]] = ()


def report_page(report: Mapping[str, Any], course: Course) -> str:
    """The page of a run. Raises NotInstalled."""
    run = report["run"]
    sites = f"{run['sites']} site{'s' if run['sites'] > 1 else ''}"
    return _page(
        eyebrow="training run",
        title=run["name"],
        lead=(
            f"{sites}, replication {run['replication']}, {run['optimizer']}, {run['codec']} on the "
            f"wire, {run['rounds']} rounds of {run['local_steps']} local steps. "
            f"Text: {run['data']}."
        ),
        figures=_key_figures(report),
        drawings=_drawings(report, course),
        tables=report_tables(report, course),
    )


def write_page(run_dir: Path, report: Mapping[str, Any], unwritten: Unwritten) -> Path | None:
    """Writes report.html into the run folder; None if that is not possible.

    Without the extra `plot` no page is written, and nothing is said. Nothing raises: a run must not
    fail because of its plots. `unwritten`: notes files that cannot be written.
    """
    file = run_dir / PAGE
    try:
        write_text(file, report_page(report, known_course(run_dir) or course_of([])))
    except NotInstalled:
        return None
    except OSError as error:
        unwritten.note(file, error)
        return None
    except Exception as error:
        _log.warning("no %s: %s: %s", file, type(error).__name__, error)
        return None
    return file


def comparison_page(runs: Mapping[str, StoredRun]) -> str:
    """The page of several runs, by name. Raises NotInstalled."""
    courses = {name: run.course for name, run in runs.items()}
    drawn = [
        (
            "Loss against bytes",
            against_plot(courses, "bytes"),
            "Lines: training, mean of all sites. Dots: validation of the global model.",
        ),
        ("Loss against tokens", against_plot(courses, "tokens"), "The same by training tokens."),
    ]
    return _page(
        eyebrow="training runs",
        title=f"{len(runs)} runs",
        lead=", ".join(runs),
        figures=[],
        drawings=[_Drawing(title, svg, text, True) for title, svg, text in drawn if svg],
        tables=comparison_tables(runs),
    )


def _key_figures(report: Mapping[str, Any]) -> list[_Figure]:
    validation, run, sites = report["validation"], report["run"], report["sites"]
    sent = sum(site["bytes_sent"] for site in sites) / len(sites)
    ddp = sum(site["planned"]["ddp_bytes"] for site in sites) / len(sites)
    busy = max(site["local_s"] + site["meeting_s"] for site in sites)
    figures = [
        _Figure("Validation loss", f"{validation['loss']:.4f}", "nats per token"),
        _Figure("Validation", f"{validation['bits_per_byte']:.3f}", "bits per byte"),
    ]
    if sent:
        less = f"{ddp / sent:.0f} times less than DDP" if ddp > sent else "in meetings"
        figures.append(_Figure("Sent by a site", human_bytes(sent), less))
    if busy:
        text = human_count(run["tokens"] / busy)
        figures.append(_Figure("Tokens per second", text, "all sites, in rounds"))
    figures.append(_Figure("Training tokens", human_count(run["tokens"]), "all sites"))
    figures.append(_Figure("Time", f"{run['wall_s']:.1f} s", "from start to report"))
    return figures


def _drawings(report: Mapping[str, Any], course: Course) -> list[_Drawing]:
    loss, sent = loss_plot(report, course), bytes_plot(report)
    drawings = []
    if loss is not None:
        drawings.append(
            _Drawing("Loss", loss, "The band spans the training losses of the sites.", True)
        )
    if sent is not None:
        text = "Predicted: by the cost model. Full replica and DDP: the same tokens and steps."
        drawings.append(_Drawing("Bytes sent", sent, text))
    drawings.append(_Drawing("Time", time_plot(report), "From start to report."))
    drawings.append(
        _Drawing(
            "Load per expert",
            load_plot(report["validation"]["load"]),
            "Slots of the validation text that chose an expert, as a share of an even load:",
            True,
            _SHADES,
        )
    )
    return drawings


def _is_wide(table: ReportTable) -> bool:
    """Whether a table needs the width of the page, by the lengths of its longest cells."""
    columns = zip(*table.rows, strict=True)
    widest = sum(max(map(len, cells), default=0) + 2 for cells in columns)
    return widest + 4 * len(table.columns) > _NARROW or len(table.rows) > _SHORT


def _page(drawings: Sequence[_Drawing], **content: Any) -> str:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise NotInstalled("a report in HTML", "jinja2", "plot", error) from None
    source = _TEMPLATE.read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(source)
    content["tables"] = [(table, _is_wide(table)) for table in content["tables"]]
    shown = [drawing._replace(svg=Markup(drawing.svg)) for drawing in drawings]
    return template.render(drawings=shown, **content) + "\n"
