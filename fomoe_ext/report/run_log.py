"""The output of a run during training: metrics.jsonl, TensorBoard, and a progress display.

Only site 0 makes a `RunLog`. Progress is one live line on a terminal, else a plain line per round.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text

from fomoe_ext.files.unwritten import AppendedFile, Unwritten
from fomoe_ext.report.metrics import MetricsFile
from fomoe_ext.report.units import human_bytes, human_count

_REFRESH_S = 0.2


class _Board:
    """Writes scalars as TensorBoard events, in one file per start of a job, without buffering."""

    def __init__(self, folder: Path, first_step: int, unwritten: Unwritten) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise RuntimeError(
                "TensorBoard is not installed: `pip install tensorboard`, or give --no-tensorboard"
            ) from error
        self._events, self._summaries, self._records = event_pb2, summary_pb2, RecordWriter
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        while (folder / name).exists():
            name += ".0"
        self._file = AppendedFile(folder / name, unwritten, "events")
        self._write(file_version="brain.Event:2")
        if first_step:
            # Makes TensorBoard discard later steps of an earlier start.
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=first_step + 1, session_log=log)

    def _write(self, **event: Any) -> None:
        record = io.BytesIO()
        made = self._events.Event(wall_time=time.time(), **event)
        self._records(record).write(made.SerializeToString())
        self._file.write(record.getvalue())

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes values by name at a step."""
        values = [
            self._summaries.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
        ]
        self._write(step=step, summary=self._summaries.Summary(value=values))

    def flush(self) -> None:
        """Tries again to write what is left."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _ProgressLine(Progress):
    """The live line of a job. Parts that do not fit continue on a line below."""

    def get_renderable(self) -> RenderableType:
        lines = [
            line
            for task in self.tasks
            for line in progress_lines(
                (int(task.completed), int(task.total or 0)),
                task.time_remaining,
                task.fields["note"],
                self.console.width,
            )
        ]
        return Text("\n".join(lines), overflow="fold")


_BAR = 20


def progress_lines(
    steps: tuple[int, int], seconds_left: float | None, note: Sequence[str], width: int
) -> list[str]:
    """The progress of a job in lines of at most `width` characters: a bar if there is room, steps
    taken and total steps, the remaining time (None = not known), and the parts of the note."""
    done, total = steps
    left = "-:--:--"
    if seconds_left is not None:
        minutes, seconds = divmod(int(seconds_left), 60)
        left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    parts = ["training", f"{done}/{total}", left]
    if len("  ".join(parts)) + 2 + _BAR <= width:
        filled = _BAR * done // max(1, total)
        parts.insert(1, "━" * filled + "·" * (_BAR - filled))
    lines = [""]
    for part in [*parts, *note]:
        longer = f"{lines[-1]}  {part}" if lines[-1] else part
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


class RunLog:
    """Writes records to files and progress to the console. Use as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        *,
        total_rounds: int,
        local_steps: int,
        first_step: int = 0,
        tensorboard: bool = True,
        console: Console | None = None,
        unwritten: Unwritten | None = None,
    ) -> None:
        """`unwritten`: notes files that could not be written."""
        unwritten = unwritten or Unwritten()
        self.console = console or Console()
        self._file = MetricsFile(run_dir / "metrics.jsonl", unwritten)
        self._board: _Board | None = None
        if tensorboard:
            self._board = _Board(run_dir / "tensorboard", first_step, unwritten)
        self._total_rounds, self._local_steps = total_rounds, local_steps
        self._shown = 0.0
        self._round_note: list[str] = []
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = _ProgressLine(console=self.console)
            total = total_rounds * local_steps
            self._task = self._progress.add_task(
                "training", total=total, completed=first_step, note=[]
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
            with suppress(OSError):
                self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def flush(self) -> None:
        """Tries again to write what could not be written before."""
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def say(self, message: str) -> None:
        """Prints a line, above the progress line if there is one."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, loss: Callable[[], float], tokens_per_s: float) -> None:
        """Shows a local step of site 0. `loss` is called only when the display is refreshed."""
        if self._progress is None or time.monotonic() - self._shown < _REFRESH_S:
            return
        self._shown = time.monotonic()
        note = [f"loss {loss():.3f}", f"{human_count(tokens_per_s)} tok/s", *self._round_note]
        self._progress.update(self._task, completed=step, note=note)

    def round(self, record: Mapping[str, Any]) -> None:
        """Records a round after its meeting. The record needs round, step, loss, lr, tokens_per_s,
        skipped_share, bytes_sent and meeting_s; all its numbers go to the files."""
        self._record("round", record)
        self._round_note = _noteworthy(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"])
            return
        self.say(
            f"round {record['round']:>4}/{self._total_rounds}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.2e}  {human_count(record['tokens_per_s'])} tok/s  "
            f"{'  '.join([*self._round_note, ''])}meeting {record['meeting_s']:.2f} s"
        )

    def validation(self, record: Mapping[str, Any]) -> None:
        """Records a validation of the global model. The record needs round, step, loss and
        bits_per_byte."""
        self._record("validation", record)
        self.say(
            f"round {record['round']:>4}/{self._total_rounds}  validation: loss "
            f"{record['loss']:.4f} nats/token, {record['bits_per_byte']:.3f} bits/byte"
        )

    def event(self, kind: str, **record: Any) -> None:
        """Records any other event in metrics.jsonl."""
        self._record(kind, record)

    def _record(self, kind: str, record: Mapping[str, Any]) -> None:
        self._file.write({"kind": kind, "time": round(time.time(), 3), **record})
        if self._board is not None and "step" in record:
            scalars = {
                f"{kind}/{key}": float(value)
                for key, value in record.items()
                if isinstance(value, (int, float)) and key != "step"
            }
            self._board.add_scalars(scalars, record["step"])


def _noteworthy(record: Mapping[str, Any]) -> list[str]:
    """The skipped share and bytes sent of a round, each only if it is not 0."""
    words = []
    if record["skipped_share"] >= 0.005:  # less is shown as 0%
        words.append(f"skipped {record['skipped_share']:.0%}")
    if record["bytes_sent"]:
        words.append(f"sent {human_bytes(record['bytes_sent'])}/site")
    return words
