"""Loss curves of a run over rounds and tokens, from the records of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fomoe_ext.report.metrics import read_metrics
from fomoe_ext.report.runs import METRICS
from fomoe_ext.report.tables import ReportTable

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 40


class Point(NamedTuple):
    """A loss in nats per token at the end of a round.

    tokens: number that all sites have trained on so far, None if not recorded. sent: bytes that the
    first site has sent in meetings so far. low, high: lowest and highest loss of a site.
    """

    round: int
    loss: float
    tokens: int | None
    sent: int
    low: float
    high: float


class Course(NamedTuple):
    """Training loss by round, the mean of all sites, and validation loss of the global model."""

    training: list[Point]
    validation: list[Point]


def read_course(run_dir: Path) -> Course:
    """The loss curves of a run from its folder; empty without metrics.

    Raises ValueError naming a damaged line, and OSError.
    """
    path = run_dir / METRICS
    return course_of(read_metrics(path) if path.is_file() else [])


def course_of(records: Sequence[Mapping[str, Any]]) -> Course:
    """The loss curves from the records of a metrics.jsonl."""
    training: list[Point] = []
    validation: list[Point] = []
    tokens: int | None = 0
    sent = 0
    for record in records:
        kind = record.get("kind")
        if kind == "round":
            tokens = None if tokens is None or "tokens" not in record else tokens + record["tokens"]
            sent += record["bytes_sent"]
            losses = [x for x in record.get("losses", ()) if math.isfinite(x)] or [record["loss"]]
            low, high = min(losses), max(losses)
            training.append(Point(record["round"], record["loss"], tokens, sent, low, high))
        elif kind == "validation":
            loss = record["loss"]
            validation.append(Point(record["round"], loss, tokens, sent, loss, loss))
    return Course(training, validation)


def bits_per_nat(report: Mapping[str, Any]) -> float:
    """Bits per byte for a loss of one nat per token; NaN if the run's loss is NaN."""
    validation = report["validation"]
    return validation["bits_per_byte"] / validation["loss"] if validation["loss"] else math.nan


def uniform_loss(report: Mapping[str, Any]) -> float | None:
    """Loss of a uniform distribution over tokens, in nats per token; None if the report does not
    have the size of the vocabulary."""
    size = report["run"].get("vocab_size")
    return math.log(size) if size else None


def sparkline(values: Sequence[float], low: float, high: float, width: int = _MOST_BARS) -> str:
    """Values as a line of at most `width` bars between `low` and `high`.

    A bar is the mean of neighbouring values, or a dot if one of them is NaN or infinite.
    """
    count = min(len(values), width)
    bars = []
    for i in range(count):
        some = values[i * len(values) // count : (i + 1) * len(values) // count]
        mean = sum(some) / len(some)
        if not math.isfinite(mean):
            bars.append("·")
            continue
        share = (mean - low) / (high - low) if high > low else 0.0
        bars.append(_BARS[min(len(_BARS) - 1, int(share * len(_BARS)))])
    return "".join(bars)


def loss_table(report: Mapping[str, Any], course: Course) -> ReportTable | None:
    """The loss over the run, with a row each for training and validation; None without metrics."""
    named = [("training", course.training), ("validation", course.validation)]
    named = [(name, points) for name, points in named if points]
    every = [point.loss for _, points in named for point in points if math.isfinite(point.loss)]
    if not every:
        return None
    bits, low, high = bits_per_nat(report), min(every), max(every)
    rows = []
    for name, points in named:
        first, last = points[0].loss, points[-1].loss
        bars = sparkline([point.loss for point in points], low, high)
        rows.append((name, f"{first:.4f}", bars, f"{last:.4f}", f"{last * bits:.3f}"))
    starts = " and ".join(f"the {name} of round {points[0].round}" for name, points in named)
    note = f"First: {starts}. Training: the mean of all sites."
    uniform = uniform_loss(report)
    if uniform is not None:
        rows.insert(0, ("uniform guessing", f"{uniform:.4f}", "", "", f"{uniform * bits:.3f}"))
        note += (
            f" Uniform guessing gives each of the {report['run']['vocab_size']} tokens the same "
            "probability."
        )
    return ReportTable(
        "Loss, nats per token",
        ("", "first", "course", "last", "bits per byte"),
        tuple(rows),
        note,
        texts=(0, 2),
    )
