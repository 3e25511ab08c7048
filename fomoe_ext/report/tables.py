"""Tables of text with a title and a note: as Markdown, and on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class ReportTable(NamedTuple):
    """A titled table of text, with a note below; the first column is text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def shown_parts(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Columns of a table of these rows; what only jobs with frozen or shadow copies have, only with
    them."""
    special = ("stale_copies", "stale_experts", "shadow_copies")
    return [part for part in rows[0] if part not in special or any(row[part] for row in rows)]


def markdown_table(table: ReportTable) -> str:
    """A table as Markdown, with its title as a heading."""
    lines = [f"## {table.title}", "", "| " + " | ".join(table.columns) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.columns) - 1)) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


def print_tables(tables: Sequence[ReportTable], console: Console) -> None:
    """Tables on a terminal, or as plain text where there is none."""
    for table in tables:
        shown = Table(title=table.title, caption=table.note or None, title_justify="left")
        shown.caption_justify = "left"
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
