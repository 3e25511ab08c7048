"""Tables of text with a title and a note: as Markdown, and as lines of a given width.

No cell is ever cut. A table that is too wide wraps its heads, then swaps rows and columns where it
has few rows, then continues below with the columns that are left.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

PLAIN_WIDTH = 120
"""Columns of a line where there is no terminal, and COLUMNS is not set."""
_NOTE_WIDTH = 100
_GAPS = (3, 2)
"""Spaces between columns, and where there is little room."""
_LABEL = 24
"""Words of so many characters stay on one line."""
_MOST_TURNED = 6
"""A table of so many rows may swap rows and columns."""
_STYLES = {"title": "bold", "head": "dim", "note": "dim italic"}


class ReportTable(NamedTuple):
    """A titled table of text, with a note below.

    `texts`: the columns that hold words. They are left-aligned and wrap at spaces where the table
    is too wide. All others hold numbers: right-aligned, each in one piece.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    texts: tuple[int, ...] = (0,)


class Line(NamedTuple):
    """A line of a table, and what it is: title, head, row or note."""

    kind: str
    text: str


def shown_parts(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Columns of a table of these rows. Frozen and shadow copies are shown only where a row has
    some."""
    special = ("stale_copies", "stale_experts", "shadow_copies")
    return [part for part in rows[0] if part not in special or any(row[part] for row in rows)]


def site_rows(cells: Mapping[int, tuple[str, ...]], before: str = "") -> list[tuple[str, ...]]:
    """A row for every site, one for all those whose cells are equal; `before`: of the label."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for site, row in cells.items():
        groups.setdefault(row, []).append(site)
    every = len(groups) == 1 and len(cells) > 1
    return [
        (before + ("each site" if every else _sites(sites)), *row) for row, sites in groups.items()
    ]


def _sites(numbers: Sequence[int]) -> str:
    """Sites in words: site 3; sites 0-2, 5."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    words = ", ".join("-".join(map(str, span)) for span in spans)
    return f"{'site' if len(numbers) == 1 else 'sites'} {words}"


def markdown_table(table: ReportTable) -> str:
    """A table as Markdown, with its title as a heading."""
    lines = [f"## {table.title}", "", "| " + " | ".join(table.columns) + " |"]
    aligned = ["---" if i in table.texts else "---:" for i in range(len(table.columns))]
    lines.append("|" + "|".join(aligned) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- for a given width


def table_lines(table: ReportTable, width: int) -> list[Line]:
    """A table in lines of at most `width` characters.

    Every number stands whole on one line. Words wrap at spaces only, so that a line gets longer
    than `width` where one word does not fit.
    """
    lines = [Line("title", part) for part in _wrapped(table.title, width)]
    for i, part in enumerate(_parts(table, width)):
        if i:
            lines.append(Line("row", ""))
        lines += _part_lines(part, width)
    note = min(width, _NOTE_WIDTH)
    lines += [Line("note", text) for text in (_wrapped(table.note, note) if table.note else ())]
    return lines


def print_tables(tables: Sequence[ReportTable], console: Console) -> None:
    """Tables on a terminal of any width, or as plain text where there is none."""
    width = text_width(console)
    for i, table in enumerate(tables):
        if i:
            console.print()
        for kind, text in table_lines(table, width):
            styled = Text(text, style=_STYLES.get(kind, ""))
            console.print(styled, soft_wrap=True, highlight=False)


def text_width(console: Console) -> int:
    """Columns to lay tables out for: the terminal's; else those of COLUMNS, or `PLAIN_WIDTH`."""
    if console.is_terminal:
        return console.width
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdigit() and int(columns) else PLAIN_WIDTH


def _parts(table: ReportTable, width: int) -> list[ReportTable]:
    """Tables that fit, one below the other, and hold all of a table."""
    turned = _turned(table)
    for whole in (table, turned):
        if whole is not None and _least_width(whole, min(_GAPS)) <= width:
            return [whole]
    parts, taken = [], 1
    while taken < len(table.columns):
        end = taken + 1
        while (
            end < len(table.columns)
            and _least_width(_some(table, taken, end + 1), min(_GAPS)) <= width
        ):
            end += 1
        parts.append(_some(table, taken, end))
        taken = end
    return parts or [table]


def _some(table: ReportTable, start: int, end: int) -> ReportTable:
    """The first column and those from `start` to `end`."""
    chosen = [0, *range(start, end)]
    return table._replace(
        columns=tuple(table.columns[i] for i in chosen),
        rows=tuple(tuple(row[i] for i in chosen) for row in table.rows),
        texts=tuple(n for n, i in enumerate(chosen) if i in table.texts),
    )


def _turned(table: ReportTable) -> ReportTable | None:
    """The table with rows and columns swapped; None where that reads badly."""
    few = 0 < len(table.rows) <= _MOST_TURNED
    if not few or table.texts != (0,) or not all(table.columns[1:]):
        return None
    labels, *columns = zip(*table.rows, strict=True)
    rows = [(head, *cells) for head, cells in zip(table.columns[1:], columns, strict=True)]
    return table._replace(columns=(table.columns[0], *labels), rows=tuple(rows))


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _unbroken(text: str) -> int:
    """The least width that words want: a label stays in one piece, a sentence wraps."""
    return len(text) if len(text) <= _LABEL else _longest_word(text)


def _cells(table: ReportTable, column: int) -> list[str]:
    return [row[column] for row in table.rows]


def _least(table: ReportTable, column: int) -> int:
    """The least width of a column: of its longest cell and the longest word of its head."""
    size = _unbroken if column in table.texts else len
    return max([_longest_word(table.columns[column]), *map(size, _cells(table, column))])


def _least_width(table: ReportTable, gap: int) -> int:
    count = len(table.columns)
    return sum(_least(table, i) for i in range(count)) + gap * (count - 1)


def _widths(table: ReportTable, width: int, gap: int) -> list[int]:
    """The width of every column: what its cells and head want, as far as there is room."""
    count = range(len(table.columns))
    widths = [_least(table, i) for i in count]
    room = width - sum(widths) - gap * (len(widths) - 1)
    cells = {i: max(map(len, _cells(table, i)), default=0) for i in table.texts}
    heads = {i: len(table.columns[i]) for i in count}
    for wanted, partly in ((cells, True), (heads, False)):
        for i in sorted(wanted, key=lambda i: wanted[i] - widths[i]):
            more = max(0, wanted[i] - widths[i])
            if partly or more <= room:  # a head wraps, or it does not
                widths[i] += min(room, more)
                room -= min(room, more)
    return widths


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(1, width), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


def _part_lines(table: ReportTable, width: int) -> list[Line]:
    gap = next((gap for gap in _GAPS if _least_width(table, gap) <= width), min(_GAPS))
    widths = _widths(table, width, gap)

    def row(cells: Sequence[Sequence[str]], kind: str) -> list[Line]:
        lines = []
        for parts in zip_longest(*cells, fillvalue=""):
            texts = [
                part.ljust(size) if i in table.texts else part.rjust(size)
                for i, (part, size) in enumerate(zip(parts, widths, strict=True))
            ]
            lines.append(Line(kind, (" " * gap).join(texts).rstrip()))
        return lines

    lines = []
    if any(table.columns):
        heads = [_wrapped(head, size) for head, size in zip(table.columns, widths, strict=True)]
        tallest = max(map(len, heads))  # heads stand on the line below them
        lines += row([[""] * (tallest - len(head)) + head for head in heads], "head")
        lines.append(Line("head", "─" * (sum(widths) + gap * (len(widths) - 1))))
    for cells in table.rows:
        wrapped = [
            _wrapped(cell, widths[i]) if i in table.texts else [cell]
            for i, cell in enumerate(cells)
        ]
        lines += row(wrapped, "row")
    return lines
