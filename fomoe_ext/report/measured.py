"""What a run has measured of its experts, read from its folder for the placements of another job.

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


def measured_load(path: Path) -> list[list[float]]:
    """Load by layer and expert, for `placement.spread`: what the validation text has shown.

    `path`: a run folder, whose last validation is taken, or a JSON file that holds the table
    [layer][expert]. Raises FileNotFoundError where there is none, ValueError naming the file for
    anything else than such a table.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load: {path} does not exist, name a run folder or a JSON file")
    if not path.is_dir():
        try:
            table = loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"load: {path} is not JSON: {error}") from None
        return _table(table, str(path))
    file = path / METRICS
    if not file.is_file():
        raise FileNotFoundError(f"load: {path} is no run folder, it has no {METRICS}")
    found = [
        record["load"]
        for record in read_metrics(file)
        if isinstance(record, dict) and record.get("kind") == "validation" and "load" in record
    ]
    if not found:
        raise ValueError(f"load: {file} has no validation with a load yet")
    return _table(found[-1], str(file))


def measured_coactivation(path: Path) -> NDArray[np.int64]:
    """Counts int [L, E, E], for `Placement.from_coactivation`: what the validation text has shown.

    `path`: a run folder, whose report is read, or a JSON file that holds the table. Raises
    FileNotFoundError where there is none, ValueError naming the file for anything else.
    """
    from fomoe_ext.placement.coactivation import checked_counts  # loads numpy

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"coactivation: {path} does not exist, name a run folder or a JSON file"
        )
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"coactivation: {path} has no {REPORT}: it is no finished run")
    try:
        table = loads(file.read_bytes(), nan=True)
    except ValueError as error:
        raise ValueError(f"coactivation: {file} is not JSON: {error}") from None
    if path.is_dir():
        table = unsealed(table, file)
        try:
            table = table["validation"]["coactivation"]
        except (KeyError, TypeError):
            raise ValueError(
                f"coactivation: {file} has no validation.coactivation: the run needs --coactivation"
            ) from None
    try:
        return checked_counts(table)
    except (ValueError, TypeError) as error:
        raise ValueError(f"coactivation: {file}: {error}") from None


def _table(table: Any, source: str) -> list[list[float]]:
    good = isinstance(table, list) and table and all(isinstance(row, list) for row in table)
    if not good or not table[0] or len({len(row) for row in table}) > 1:
        raise ValueError(
            f"load: {source} must hold a table [layer][expert] with rows of one length"
        )
    for layer, row in enumerate(table):
        for expert, value in enumerate(row):
            if not is_load(value):
                raise ValueError(
                    f"load: {source}, layer {layer}, expert {expert} must be a finite number of at "
                    f"least 0, got {value!r}"
                )
    return [[float(value) for value in row] for row in table]
