"""A finished run, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fomoe_ext.config.job import TrainConfig
from fomoe_ext.files.atomic import unsealed
from fomoe_ext.files.json_values import loads
from fomoe_ext.report.course import Course, read_course
from fomoe_ext.report.runs import CONFIG, REPORT, load_run_config, run_of


class StoredRun(NamedTuple):
    """A run: its folder, report, loss curves, and configuration if there is one."""

    folder: Path
    report: dict[str, Any]
    course: Course
    config: TrainConfig | None


def read_run(path: Path) -> StoredRun:
    """The run in a run folder, which may be given by a checkpoint in it.

    Raises FileNotFoundError without a report, and ValueError naming a damaged file.
    """
    folder = run_of(path)
    file = folder / REPORT
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder} does not exist")
    course = read_course(folder)
    if not file.is_file():
        if not course.training:
            raise FileNotFoundError(f"run must be a run folder with {REPORT}, got {folder}")
        last = course.training[-1]
        raise FileNotFoundError(
            f"run must be a finished run with {REPORT}, got {folder}: its last round so far is "
            f"{last.round}, with a training loss of {last.loss:.4f}"
        )
    try:
        report = unsealed(loads(file.read_bytes(), nan=True), file)
    except ValueError as error:
        raise ValueError(error if str(file) in str(error) else f"{file}: {error}") from None
    config = load_run_config(folder) if (folder / CONFIG).is_file() else None
    return StoredRun(folder, report, course, config)
