"""Validation loss against bits per parameter: one training job per codec and seed, equally long.

    python bench/loss_vs_bits.py --seeds 3
    python bench/loss_vs_bits.py --seeds 1 --codecs fp32 int8 -- --rounds 8 --sites 2

What follows `--` is passed to `fomoe train`. Each run is recorded when it ends, so an interrupted
series can be continued. The file also keeps runs with other flags, which are not mixed with these.
Differences are between a codec and fp32 with the same seed: both start from the same weights and
see the same data in the same order.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fomoe_ext.files.atomic import write_text
from fomoe_ext.placement import wire

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

CODECS = ("fp32", "bf16", "int8", "int4", "int2", "topk")
BASE = "fp32"
WANTED = {"int8": 0.1, "int4": 0.5, "topk": 1.0}  # % of the loss of fp32 that may be lost
DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "loss_vs_bits"
JOB = {"--router-scope": "global", "--local-steps": "16", "--rounds": "48"}
"""Flags of the jobs, unless they are given after `--`: a meeting every 16 steps."""
TAIL_LINES = 15  # of a failed run's output

Run = Mapping[str, Any]


def bits_per_parameter(codec: str, numel: int = 1 << 20) -> float:
    """Bits per value of a large payload."""
    return 8 * wire.wire_bytes(codec, numel) / numel


class Row(NamedTuple):
    """A codec's figures. Losses and differences are by seed; differences in % of fp32's loss."""

    codec: str
    bits: float
    bytes_sent: float
    """Bytes that a site sent in one run: the mean over sites."""
    losses: dict[int, float]
    differences: dict[int, float]
    as_predicted: bool
    """Whether every site in every run sent exactly the predicted number of bytes."""

    @property
    def good(self) -> bool | None:
        """Whether the mean difference meets the target; None without a target or a difference."""
        if self.codec not in WANTED or not self.differences:
            return None
        return fmean(self.differences.values()) <= WANTED[self.codec]


def summarise(runs: Sequence[Run]) -> list[Row]:
    """A row per codec, by ascending bits. All `runs` must have the same flags."""
    by_codec: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        by_codec.setdefault(run["codec"], {})[run["seed"]] = run
    base = {seed: run["loss"] for seed, run in by_codec.get(BASE, {}).items()}
    rows = []
    for codec, of_seed in by_codec.items():
        losses = {seed: run["loss"] for seed, run in of_seed.items()}
        sent = [count for run in of_seed.values() for count in run["bytes_sent"]]
        rows.append(
            Row(
                codec,
                bits_per_parameter(codec),
                fmean(sent),
                losses,
                {
                    seed: 100 * (loss - base[seed]) / base[seed]
                    for seed, loss in losses.items()
                    if seed in base
                },
                all(run["bytes_sent"] == run["bytes_predicted"] for run in of_seed.values()),
            )
        )
    return sorted(rows, key=lambda row: -row.bits)


# ---- the file of data ----------------------------------------------------------------------------


def load_runs(path: Path) -> list[dict[str, Any]]:
    """All runs in the file, empty if there is no file. ValueError if it is another kind of file."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["runs"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--out must name a file of this benchmark, got {path}: {error}") from None


def with_flags(runs: Sequence[dict[str, Any]], flags: Sequence[str]) -> list[dict[str, Any]]:
    """The runs that were made with exactly these flags."""
    return [run for run in runs if run["flags"] == list(flags)]


def save_runs(path: Path, runs: Sequence[Run]) -> None:
    """Replaces the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"runs": list(runs)}, indent=1) + "\n")


def add_run(path: Path, run: Run) -> None:
    """Adds a run to the file; safe while another process does the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(folder, fcntl.LOCK_EX)
        save_runs(path, [*load_runs(path), run])
    finally:
        os.close(folder)


def figures(report: Run, codec: str, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """The record of a run, from its report.json."""
    sites = report["sites"]
    return {
        "codec": codec,
        "seed": seed,
        "flags": list(flags),
        "loss": report["validation"]["loss"],
        "bits_per_byte": report["validation"]["bits_per_byte"],
        "validation_tokens": report["validation"]["tokens"],
        "bytes_sent": [site["bytes_sent"] for site in sites],
        "bytes_predicted": [site["planned"]["bytes"] for site in sites],
        "run": report["run"],
    }


# ---- running -------------------------------------------------------------------------------------


class RunFailed(RuntimeError):
    """A training job failed; the message has the end of its output."""


def train(codec: str, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """Runs the job and returns its record."""
    with tempfile.TemporaryDirectory(prefix="loss-vs-bits-") as folder:
        run_dir = Path(folder) / "run"
        words = ["--codec", codec, "--seed", str(seed), "--eval-rounds", "0", "--no-tensorboard"]
        words += [w for flag, value in JOB.items() if flag not in flags for w in (flag, value)]
        command = [sys.executable, "-m", "fomoe_ext.cli", "train", "--run-dir", str(run_dir)]
        done = subprocess.run(
            [*command, *words, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            tail = "\n".join(done.stdout.splitlines()[-TAIL_LINES:])
            raise RunFailed(f"{codec}, seed {seed}: exit code {done.returncode}\n{tail}")
        return figures(json.loads((run_dir / "report.json").read_text()), codec, seed, flags)


def machine_facts() -> dict[str, Any]:
    """Machine, commit and versions."""
    import machine
    import torch

    return machine.Watch("cuda" if torch.cuda.is_available() else "cpu").facts()


def run_missing(path: Path, codecs: Sequence[str], seeds: int, flags: Sequence[str]) -> int:
    """Makes the runs that the file lacks and records each as it ends; returns how many failed."""
    runs = load_runs(path)
    there = {(run["codec"], run["seed"]) for run in with_flags(runs, flags)}
    todo = [(c, s) for s in range(seeds) for c in codecs if (c, s) not in there]
    if not todo:
        return 0
    facts, failed = machine_facts(), 0
    for number, (codec, seed) in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {codec}, seed {seed} ...", end=" ", flush=True)
        try:
            run = train(codec, seed, flags)
        except RunFailed as error:
            failed += 1
            print(f"failed\n{error}", flush=True)
            continue
        # Read again: another process may have added runs meanwhile.
        add_run(path, {**run, "machine": facts})
        print(f"loss {run['loss']:.4f} after {run['run']['wall_s']:.0f} s", flush=True)
    return failed


# ---- table and plot ------------------------------------------------------------------------------


def loss_table(rows: Sequence[Row], runs: Sequence[Run]) -> Table:
    tokens = runs[0]["run"]["tokens"]
    seeds = sorted({seed for row in rows for seed in row.losses})
    table = Table(title=f"validation loss against bits, {tokens:,} training tokens each")
    table.add_column("codec")
    for name in ("bits/parameter", "MB sent per site", *(f"seed {s}" for s in seeds), "mean"):
        table.add_column(name, justify="right")
    for name in ("mean diff %", "largest diff %", "target %", "bytes as predicted"):
        table.add_column(name, justify="right")
    for row in rows:
        differences = list(row.differences.values())
        miss = "*" if row.good is False else ""
        table.add_row(
            row.codec,
            f"{row.bits:.3f}",
            f"{row.bytes_sent / 1e6:.2f}",
            *(f"{row.losses[s]:.4f}" if s in row.losses else "-" for s in seeds),
            f"{fmean(row.losses.values()):.4f}",
            f"{fmean(differences):+.3f}{miss}" if differences else "-",
            f"{max(differences):+.3f}" if differences else "-",
            f"{WANTED[row.codec]:g}" if row.codec in WANTED else "-",
            "yes" if row.as_predicted else "NO",
        )
    return table


def notes(runs: Sequence[Run], flags: Sequence[str]) -> list[str]:
    """Lines below the table: the setting, versions and commits."""
    first = runs[0]["run"]
    commits = sorted({str(run["machine"]["commit"]) for run in runs})
    torches = sorted({run["machine"]["torch"] for run in runs})
    threads = sorted({str(run["machine"].get("isa", run["machine"]["device"])) for run in runs})
    lines = [
        "diff: difference from fp32 with the same seed, in % of its loss; above 0 is worse. * "
        "misses the target.",
        f"{first['sites']} sites, replication {first['replication']}, {first['rounds']} x "
        f"{first['local_steps']} steps; {first['data']}.",
        f"flags: {' '.join(flags) or 'none'}; torch {', '.join(torches)}, "
        f"{', '.join(threads)}, commit {', '.join(commits)}.",
    ]
    if len(commits) > 1:
        lines.append("The runs were made at several commits and may not be comparable.")
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Loss against bits per parameter: a point per seed, a line through the means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(
        [row.bits for row in rows],
        [fmean(row.losses.values()) for row in rows],
        "-",
        color="tab:blue",
        label="mean",
    )
    for number, seed in enumerate(sorted({seed for row in rows for seed in row.losses})):
        points = [(row.bits, row.losses[seed]) for row in rows if seed in row.losses]
        axes.plot(*zip(*points, strict=True), "osD^v"[number % 5], ms=4, label=f"seed {seed}")
    for row in rows:
        at = (row.bits, max(row.losses.values()))
        axes.annotate(row.codec, at, xytext=(0, 6), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row.bits for row in rows], [f"{row.bits:.3g}" for row in rows])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set_xlabel("bits per parameter of a payload")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def show(path: Path, flags: Sequence[str]) -> None:
    """Prints the table of the runs with these flags, and writes the plot next to the file."""
    runs = with_flags(load_runs(path), flags)
    if not runs:
        raise ValueError(f"{path} has no runs with the flags: {' '.join(flags) or 'none'}")
    rows = summarise(runs)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(loss_table(rows, runs))
    for line in notes(runs, flags):
        console.print(line, highlight=False, markup=False)
    try:
        plot(rows, path.with_suffix(".png"))
    except ImportError as error:
        console.print(f"no plot: {error} (pip install fomoe-ext[plot])", markup=False)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's arguments, and the flags for `fomoe train`."""
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="loss_vs_bits.py",
        description="Validation loss against bits per parameter, by codec.",
        epilog="What follows -- is passed to fomoe train.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 (default: 3)")
    parser.add_argument("--rounds", type=int, help="rounds of a run (default: as fomoe train)")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=wire.CODECS)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="path without .json or .png")
    parser.add_argument(
        "--plot-only", action="store_true", help="print and plot recorded runs, make no new ones"
    )
    given = parser.parse_args(arguments[:cut])
    flags = arguments[cut + 1 :]
    if given.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {given.seeds}")
    for name in ("--codec", "--seed", "--run-dir"):
        if any(flag == name or flag.startswith(name + "=") for flag in flags):
            parser.error(f"{name} must not be given after --: this script sets it")
    if given.rounds is not None:
        if given.rounds < 1:
            parser.error(f"--rounds must be >= 1, got {given.rounds}")
        flags = ["--rounds", str(given.rounds), *flags]
    return given, flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a run failed or there is nothing to show, else 0."""
    given, flags = parse(sys.argv[1:] if arguments is None else arguments)
    path = given.out.parent / (given.out.name + ".json")
    try:
        failed = 0 if given.plot_only else run_missing(path, given.codecs, given.seeds, flags)
        show(path, flags)
    except ValueError as error:
        print(f"loss_vs_bits.py: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
