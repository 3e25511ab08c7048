"""Runs tests, measurements and checks on a GPU, and prints a summary of at most 80 lines.

Results and logs are written to FOLDER, at most 8 files. The exit status is 1 when a step failed or
took too long.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.gpu import summary
from bench.gpu.runner import Outcome, Runner, Step
from bench.gpu.steps import ROOT, Setting, make_steps

MOST_FILES = 8
LOG_BYTES = 200_000  # kept of each step's log: half from the beginning, half from the end
ASKED = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    dated = ROOT / "bench" / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    parser.add_argument("folder", type=Path, nargs="?", default=dated, help="a new or empty folder")
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="time for all steps (default: %(default)s)"
    )
    parser.add_argument("--steps", help="run only these steps; names separated by commas")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run all steps with small sizes on the CPU, with stand-ins for the GPU's programs",
    )
    return parser.parse_args(arguments)


def chosen(steps: list[Step], wanted: str | None) -> list[Step]:
    """The steps that `wanted` names. Raises ValueError for an unknown name."""
    if wanted is None:
        return steps
    names = [name.strip() for name in wanted.split(",")]
    known = [step.name for step in steps]
    for name in names:
        if name not in known:
            raise ValueError(f"--steps must be some of {', '.join(known)}, got {name!r}")
    return [step for step in steps if step.name in names]


def gpu_line(setting: Setting) -> str:
    """What nvidia-smi reports about the GPU."""
    program = shutil.which("nvidia-smi", path=setting.programs)
    if program is None:
        return "nvidia-smi is not installed"
    command = [program, f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return said.stdout.strip() or said.stderr.strip()


def read_results(work: Path) -> summary.Results:
    """Results of all steps, by the name of their file. An incomplete last line is ignored."""
    found: summary.Results = {}
    for path in sorted(work.glob("*.jsonl")):
        entries = []
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        found[path.stem] = entries
    return found


def keep_logs(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes the outputs of all steps to one file."""
    with path.open("w") as file:
        for outcome in outcomes:
            file.write(f"==== {outcome.name}: {outcome.state}, {outcome.seconds:.1f} s\n")
            if outcome.log is not None:
                text = outcome.log.read_text(errors="replace")
                if len(text) > LOG_BYTES:
                    half = LOG_BYTES // 2
                    text = f"{text[:half]}\n[...]\n{text[-half:]}"
                file.write(text + "\n")


def keep(
    folder: Path, work: Path, outcomes: Sequence[Outcome], gpu: Sequence[str], lines: Sequence[str]
) -> None:
    """Writes summary, logs and results to the folder; bench/report.py can read the results."""
    results = read_results(work)
    facts = [{**asdict(o), "log": None} for o in outcomes]
    run = {"gpu": list(gpu), "steps": facts, "profile": results.pop("profile", [])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    keep_logs(outcomes, folder / "logs.txt")
    kept = 3
    report = work / "profile.ncu-rep"
    if report.exists():
        shutil.copy2(report, folder / report.name)
        kept += 1
    for name, entries in sorted(results.items())[: MOST_FILES - kept]:
        (folder / f"{name}.json").write_text(json.dumps({"benchmarks": entries}))


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory(prefix="fomoe-gpu-") as name:
        work = Path(name)
        setting = Setting(work, given.dry_run)
        try:
            steps = chosen(make_steps(setting), given.steps)
        except ValueError as error:
            print(f"python -m bench.gpu: {error}", file=sys.stderr)
            return 2
        if given.folder.is_dir() and any(given.folder.iterdir()):
            print(
                f"python -m bench.gpu: FOLDER must be new or empty, got {given.folder}",
                file=sys.stderr,
            )
            return 2
        gpu = [gpu_line(setting)]
        runner = Runner(work, given.seconds, lambda text: print(text, flush=True))
        outcomes = runner.run(steps)
        gpu.append(gpu_line(setting))
        lines = summary.lines_of(gpu, outcomes, read_results(work))
        keep(given.folder, work, outcomes, gpu, lines)
    print()
    print("\n".join(summary.shortened(lines, str(given.folder))))
    return 1 if any(outcome.bad for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
