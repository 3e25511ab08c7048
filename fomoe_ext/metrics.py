"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and a progress display.

Only site 0 makes a `RunLog`. On a terminal it is one live line; elsewhere one plain line per round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fomoe_ext.files import write_text
from fomoe_ext.json_values import loads

_REFRESH_S = 0.2
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human_bytes(count: float) -> str:
    """A number of bytes in decimal units: 1234567 -> '1.23 MB'."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}B"
    return f"{count:.0f} B"


def human_count(count: float) -> str:
    """A count in decimal units: 1234567 -> '1.23M'."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


class MetricsFile:
    """Appends one JSON object per line; every line is complete on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A job that was killed may have left half a line.
        text = path.read_bytes() if path.exists() else b""
        self._file = path.open("ab")
        if text and not text.endswith(b"\n"):
            self._file.truncate(text.rfind(b"\n") + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises ValueError for values that JSON cannot hold, such as tensors."""
        try:
            line = json.dumps(dict(record), allow_nan=True)
        except TypeError as error:
            raise ValueError(f"record is not JSON: {error}") from None
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl. Raises ValueError naming the line that is no JSON object."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = loads(line, nan=True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: wanted a JSON object, got {record!r:.60}")
        records.append(record)
    return records


def _step(record: Mapping[str, Any], path: Path) -> int:
    step = record.get("step", 0)
    if not isinstance(step, int):
        raise ValueError(f"{path}: step must be a whole number, got {step!r:.60}")
    return step


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the records of later steps than `step`, which a resumed job is going to write again.

    Raises ValueError for a damaged file.
    """
    if path.exists():
        records = [r for r in read_metrics(path) if _step(r, path) <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "TensorBoard is not installed: `pip install tensorboard`, or give --no-tensorboard"
        ) from error
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


class RunLog:
    """The run's voice: records to files, progress to the console. Use as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        *,
        total_rounds: int,
        local_steps: int,
        first_step: int = 0,
        tensorboard: bool = True,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console()
        self._file = MetricsFile(run_dir / "metrics.jsonl")
        self._board = _tensorboard(run_dir / "tensorboard", first_step) if tensorboard else None
        self._total_rounds, self._local_steps = total_rounds, local_steps
        self._shown = 0.0
        self._round_note = ""
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            total = total_rounds * local_steps
            self._task = self._progress.add_task(
                "training", total=total, completed=first_step, note=""
            )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def say(self, message: str) -> None:
        """A line for the reader, above the progress line where there is one."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, loss: Callable[[], float], tokens_per_s: float) -> None:
        """After a local step of site 0. `loss` is asked only when the display is due."""
        if self._progress is None or time.monotonic() - self._shown < _REFRESH_S:
            return
        self._shown = time.monotonic()
        note = f"loss {loss():.3f}  {human_count(tokens_per_s)} tok/s{self._round_note}"
        self._progress.update(self._task, completed=step, note=note)

    def round(self, record: Mapping[str, Any]) -> None:
        """After a meeting. Wants round, step, loss, lr, tokens_per_s, skipped_share, bytes_sent and
        meeting_s; all numbers go to the files."""
        self._record("round", record)
        sent = human_bytes(record["bytes_sent"])
        self._round_note = f"  skipped {record['skipped_share']:.0%}  sent {sent}/site"
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"])
            return
        self.say(
            f"round {record['round']:>4}/{self._total_rounds}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.2e}  {human_count(record['tokens_per_s'])} tok/s"
            f"{self._round_note}  meeting {record['meeting_s']:.2f} s"
        )

    def validation(self, record: Mapping[str, Any]) -> None:
        """After a validation of the global model. Wants round, step, loss and bits_per_byte."""
        self._record("validation", record)
        self.say(
            f"round {record['round']:>4}/{self._total_rounds}  validation: loss "
            f"{record['loss']:.4f} nats/token, {record['bits_per_byte']:.3f} bits/byte"
        )

    def event(self, kind: str, **record: Any) -> None:
        """Anything else worth a line in metrics.jsonl."""
        self._record(kind, record)

    def _record(self, kind: str, record: Mapping[str, Any]) -> None:
        self._file.write({"kind": kind, "time": round(time.time(), 3), **record})
        if self._board is not None and "step" in record:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(f"{kind}/{key}", value, record["step"])
