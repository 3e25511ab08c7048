"""The file of recorded runs: one JSON object per line, in the order in which they ended.

A run whose flags, sites and seed are in the file is not made again, whichever table needs it. So an
interrupted study can be continued.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

RUNS = Path(__file__).resolve().parents[1] / "results" / "study" / "runs.jsonl"


@dataclass(frozen=True)
class Run:
    """A training job: sites, seed, and flags of `fomoe train` (with underscores, not dashes)."""

    sites: int
    seed: int = 0
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identifies the run: equal for equal sites, seed and flags."""
        return json.dumps([self.sites, self.seed, dict(sorted(self.flags.items()))])

    def arguments(self) -> list[str]:
        """Arguments for `fomoe train`, without the number of sites."""
        words = ["--seed", str(self.seed)]
        for name, value in sorted(self.flags.items()):
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(flag)
            elif isinstance(value, (list, tuple)):
                words += [flag, *map(str, value)]
            else:
                words += [flag, str(value)]
        return words

    def named(self, **changes: Any) -> Run:
        """This run with these flags changed; None removes a flag."""
        flags = {k: v for k, v in {**self.flags, **changes}.items() if v is not None}
        return Run(self.sites, self.seed, flags)


def record(run: Run, report: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run. `report` comes from `pool.train`, `facts` describe the machine."""
    sites, lines = report["sites"], report["metrics"]
    rounds = [line for line in lines if line["kind"] == "round"]
    sent, sent_by = 0, {0: 0}
    for line in rounds:
        sent += line["bytes_sent"]
        sent_by[line["round"]] = sent
    mean = lambda name: fmean(site[name] for site in sites)
    counts = report["validation"].get("coactivation") if run.flags.get("coactivation") else None
    return {
        **({} if counts is None else {"coactivation": counts}),
        "sites": run.sites,
        "seed": run.seed,
        "flags": dict(sorted(run.flags.items())),
        "loss": report["validation"]["loss"],
        "bits_per_byte": report["validation"]["bits_per_byte"],
        "validation_tokens": report["validation"]["tokens"],
        "tokens": report["run"]["tokens"],
        "bytes_sent": [site["bytes_sent"] for site in sites],
        "bytes_predicted": [site["planned"]["bytes"] for site in sites],
        "full_replica_bytes": sites[0]["planned"]["full_replica_bytes"],
        "ddp_bytes": sites[0]["planned"]["ddp_bytes"],
        "memory": [site["memory"]["total"] for site in sites],
        "full_replica_memory": report["full_replica_memory"]["total"],
        "skipped_share": mean("skipped_share"),
        "local_s": mean("local_s"),
        "meeting_s": mean("meeting_s"),
        "job_s": report["job_s"],
        # [round, validation loss, bytes that site 0 has sent by then]
        "curve": [
            [line["round"], line["loss"], sent_by.get(line["round"], sent)]
            for line in lines
            if line["kind"] == "validation"
        ],
        "routing": [
            {k: v for k, v in line.items() if k not in ("kind", "time", "step")}
            for line in lines
            if line["kind"] == "routing"
        ],
        "model_hash": report["run"]["model_hash"],
        "parameters": report["model_parameters"],
        "machine": dict(facts),
    }


def key_of(kept: Mapping[str, Any]) -> str:
    """`Run.key` of the recorded run."""
    return Run(kept["sites"], kept["seed"], kept["flags"]).key


def load(path: Path = RUNS) -> dict[str, dict[str, Any]]:
    """Records by key, empty if there is no file. ValueError if a line is not a record."""
    if not path.exists():
        return {}
    result = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            kept = json.loads(line)
            result[key_of(kept)] = kept
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, must be a run of the study, got another line: {error}"
            ) from None
    return result


def append(kept: Mapping[str, Any], path: Path = RUNS) -> None:
    """Appends a record and syncs the file. An incomplete last line is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if fcntl is not None:  # another study may be about to
            fcntl.flock(file, fcntl.LOCK_EX)
        before = path.read_bytes()
        if before and not before.endswith(b"\n"):
            file.truncate(before.rfind(b"\n") + 1)
        file.write(json.dumps(kept).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def missing(runs: Iterable[Run], path: Path = RUNS) -> list[Run]:
    """The runs that are not in the file, without duplicates."""
    there = load(path)
    wanted = {run.key: run for run in runs}
    return [run for key, run in wanted.items() if key not in there]
