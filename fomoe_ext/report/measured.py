"""Load and co-activation that a run measured, read from its folder to place another job's experts.

Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe_ext.files.atomic import unsealed
from fomoe_ext.files.json_values import loads
from fomoe_ext.placement.spread import is_load
from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import METRICS, REPORT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def measured_load(path: Path, name: str = "path") -> list[list[float]]:
    """The load of each expert, by layer and expert, measured on validation text.

    Args:
        path: A run folder, of which the last validation is read, or a JSON file with a table
            [layer][expert].
        name: What error messages call `path`.

    Raises FileNotFoundError if the file or folder is missing, and ValueError for other content.
    """
    path = Path(path)
    _require(path, name)
    if not path.is_dir():
        try:
            table = loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{name} must be a JSON file, got {path}: {error}") from None
        return _table(table, f"{name} {path}")
    file = path / METRICS
    if not file.is_file():
        raise FileNotFoundError(f"{name} must be a run folder with {METRICS}, got {path}")
    found = [
        record["load"]
        for record in read_metrics(file)
        if isinstance(record, dict) and record.get("kind") == "validation" and "load" in record
    ]
    if not found:
        raise ValueError(f"{name} must be a run with a validation, got {path}, which has none yet")
    return _table(found[-1], f"{name} {file}")


def measured_coactivation(path: Path, name: str = "path") -> NDArray[np.int64]:
    """Counts int [L, E, E] for `Placement.from_coactivation`, measured on validation text.

    Args:
        path: A run folder, of which the report is read, or a JSON file with the table.
        name: What error messages call `path`.

    Raises FileNotFoundError if the file or folder is missing, and ValueError for other content.
    """
    from fomoe_ext.placement.coactivation import checked_counts  # loads numpy

    path = Path(path)
    _require(path, name)
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{name} must be a finished run with {REPORT}, got {path}")
    try:
        table = loads(file.read_bytes(), nan=True)
    except ValueError as error:
        raise ValueError(f"{name} must be a JSON file, got {file}: {error}") from None
    if path.is_dir():
        table = unsealed(table, file)
        try:
            table = table["validation"]["coactivation"]
        except (KeyError, TypeError):
            raise ValueError(
                f"{name} must be a run with --coactivation, got {path}, whose {REPORT} has no "
                "validation.coactivation"
            ) from None
    try:
        return checked_counts(table)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} {file}: {error}") from None


def _require(path: Path, name: str) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"{name} must be a run folder or a JSON file, got {path}, which does not exist"
        )


def _table(table: Any, source: str) -> list[list[float]]:
    """A checked load. `source`: argument and file, for messages."""
    good = isinstance(table, list) and table and all(isinstance(row, list) for row in table)
    if not good or not table[0] or len({len(row) for row in table}) > 1:
        raise ValueError(
            f"{source} must hold a table [layer][expert] with rows of one length, got {table!r:.60}"
        )
    for layer, row in enumerate(table):
        for expert, value in enumerate(row):
            if not is_load(value):
                raise ValueError(
                    f"{source}, layer {layer}, expert {expert} must be a finite number of at least "
                    f"0, got {value!r}"
                )
    return [[float(value) for value in row] for row in table]
