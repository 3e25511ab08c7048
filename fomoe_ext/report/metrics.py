"""metrics.jsonl: appending records, reading them, and removing those that a resumed job repeats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fomoe_ext.files.atomic import seal_line, unseal_line, write_text
from fomoe_ext.files.json_values import loads
from fomoe_ext.files.unwritten import AppendedFile, Unwritten


class MetricsFile:
    """Appends one JSON object per line; each line is complete when `write` returns.

    If the disk is full, nothing raises: lines are kept until there is room, and `unwritten` counts
    them.
    """

    def __init__(self, path: Path, unwritten: Unwritten | None = None) -> None:
        self._unwritten = unwritten or Unwritten()
        self._file = AppendedFile(path, self._unwritten)
        try:
            if path.exists():
                _cut_torn_line(path)
            self._file.open()
        except OSError as error:
            self._unwritten.note(path, error)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record. Raises ValueError for values that are not JSON, such as tensors."""
        try:
            line = json.dumps(dict(record), allow_nan=True)
        except TypeError as error:
            raise ValueError(f"record must have values of JSON: {error}") from None
        self._file.write(seal_line(line).encode() + b"\n")

    def flush(self) -> None:
        """Tries again to write the lines that are kept."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Removes an incomplete last line, which a killed job may have left."""
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl.

    Raises ValueError naming the line that is not a JSON object or is damaged.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = loads(unseal_line(line), nan=True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {record!r:.60}")
        records.append(record)
    return records


def _step(record: Mapping[str, Any], path: Path) -> int:
    step = record.get("step", 0)
    if not isinstance(step, int):
        raise ValueError(f"{path}: step must be a whole number, got {step!r:.60}")
    return step


def rewind_metrics(path: Path, step: int) -> None:
    """Removes the records after `step`, which a resumed job will write again.

    Raises ValueError for a damaged file, OSError if it cannot be written.
    """
    if not path.exists():
        return
    _cut_torn_line(path)
    records = read_metrics(path)
    kept = [record for record in records if _step(record, path) <= step]
    if kept == records:
        return
    if records[: len(kept)] == kept:
        # Needs no room on a full disk.
        lines = path.read_bytes().splitlines(keepends=True)[: len(kept)]
        os.truncate(path, sum(map(len, lines)))
        return
    write_text(path, "".join(seal_line(json.dumps(record)) + "\n" for record in kept))
