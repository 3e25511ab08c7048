"""Several runs side by side: their results and the options in which they differ."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fomoe_ext.config.job import SECTIONS, TrainConfig
from fomoe_ext.report.spent import seconds
from fomoe_ext.report.stored import StoredRun
from fomoe_ext.report.tables import ReportTable
from fomoe_ext.report.units import human_bytes, human_count

_NO_DIFFERENCE = {"run.run_dir", "run.resume"}


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run: that of its folder, or the whole path if two folders have one name."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]


def comparison_tables(runs: Mapping[str, StoredRun]) -> list[ReportTable]:
    """A table with a row for each run, and one with a row for each option that differs."""
    rows = tuple((name, *_figures(run.report)) for name, run in runs.items())
    columns = ("loss", "bits per byte", "tokens", "sent by a site", "vs DDP", "validation sent")
    tables = [
        ReportTable(
            "Runs side by side",
            ("", *columns, "tokens/s", "time"),
            rows,
            "Loss: on validation text, in nats per token. Sent by a site: in meetings, mean of all "
            "sites. Tokens/s: all sites together, in rounds.",
        )
    ]
    differences = _differences({name: run.config for name, run in runs.items()})
    if differences:
        texts = tuple(range(len(runs) + 1))
        tables.append(
            ReportTable("Options that differ", ("", *runs), tuple(differences), texts=texts)
        )
    return tables


def _figures(report: Mapping[str, Any]) -> tuple[str, ...]:
    validation, run, sites = report["validation"], report["run"], report["sites"]
    sent = sum(site["bytes_sent"] for site in sites) / len(sites)
    ddp = sum(site["planned"]["ddp_bytes"] for site in sites) / len(sites)
    validating = sum(site["validation_bytes"] for site in sites) / len(sites)
    busy = max(site["local_s"] + site["meeting_s"] for site in sites)
    return (
        f"{validation['loss']:.4f}",
        f"{validation['bits_per_byte']:.3f}",
        human_count(run["tokens"]),
        human_bytes(sent),
        f"{ddp / sent:.1f}x" if sent else "-",
        human_bytes(validating),
        human_count(run["tokens"] / busy) if busy else "-",
        seconds(run["wall_s"]),
    )


def _differences(configs: Mapping[str, TrainConfig | None]) -> list[tuple[str, ...]]:
    if any(config is None for config in configs.values()):
        return []
    rows = []
    every = [config for config in configs.values() if config is not None]
    for section in SECTIONS:
        for field in dataclasses.fields(getattr(every[0], section)):
            values = [getattr(getattr(config, section), field.name) for config in every]
            name = f"{section}.{field.name}"
            if name not in _NO_DIFFERENCE and any(value != values[0] for value in values):
                rows.append((name, *(_word(value) for value in values)))
    return rows


def _word(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
