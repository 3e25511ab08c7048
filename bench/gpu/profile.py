"""Profiles the grouped GEMMs with Nsight Compute; keeps its report, and some counters as results.

The counters are, for each kernel: fraction of the tensor cores' and of L2's peak, bytes of DRAM,
instructions issued per clock. The report has many more, and where warps stalled, by instruction.
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu import measured
from bench.gpu.measured import Results

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "SourceCounters",
)
COUNTERS = {  # what results call them
    "gpu__time_duration.sum": "nanoseconds",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "dram__bytes.sum.per_second": "dram_bytes_per_second",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "smsp__issue_active.avg.per_cycle_active": "issued_per_cycle",
}
_METRICS = ",".join(COUNTERS)


def profile_command(report: Path, device: str) -> list[str]:
    """Command that runs the target under the profiler; `report`: path without suffix."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    target = [sys.executable, "-m", "bench.gpu.profile_target", "--device", device]
    return [
        *("ncu", "--clock-control", "none", "--profile-from-start", "off", *sections),
        *("--metrics", _METRICS, "--force-overwrite", "--export", str(report), *target),
    ]


def counters_command(report: Path) -> list[str]:
    """Command that prints the counters in a report."""
    shown = ["--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "mangled"]
    return ["ncu", "--import", str(report), *shown]


def number(text: str) -> float | None:
    """The number in a cell, which may have commas between thousands."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def short_name(mangled: str) -> str:
    """The identifiers in a mangled name that tell our kernels apart."""
    parts: list[str] = []
    rest = mangled
    # A length before a name; not a number of a template (Li256E) or of a substitution (S1_).
    while found := re.search(r"(?<![\dbijlmS])(\d+)(?=[A-Za-z_])", rest):
        name, rest = rest[found.end() :][: int(found[1])], rest[found.end() + int(found[1]) :]
        parts.append(name)
    known = ("fomoe", "cuda")
    kept = [p for p in parts if len(p) > 2 and p not in known and not p.startswith("_GLOBAL")]
    return " ".join(dict.fromkeys(kept or [mangled]))[:100]


def read_counters(text: str) -> list[dict[str, Any]]:
    """A result for each kernel in a `--page raw` table: header, a line of units, a line each."""
    begin = text.find('"ID"')
    lines = list(csv.reader(io.StringIO(text[begin:]))) if begin >= 0 else []
    if len(lines) < 3:
        return []
    head, _, *kernels = lines
    found = []
    for kernel in kernels:
        if len(kernel) != len(head):
            continue
        cells = dict(zip(head, kernel, strict=True))
        result: dict[str, Any] = {"kernel": short_name(cells.get("Kernel Name", "?"))}
        for counter, name in COUNTERS.items():
            if counter in cells and (value := number(cells[counter])) is not None:
                result[name] = value
        found.append(result)
    return found


def main() -> int:
    given = measured.arguments(__doc__)
    results = Results(given.out, given.budget)
    report = given.out.parent / "profile"
    if code := subprocess.run(profile_command(report, given.device), check=False).returncode:
        print(f"ncu ended with exit code {code}")
        return 1
    written = report.with_suffix(".ncu-rep")
    told = subprocess.run(counters_command(written), capture_output=True, text=True, check=False)
    kernels = read_counters(told.stdout)
    for place, kernel in enumerate(kernels):
        results.add(f"profile[{place}]", kernel)
    if not kernels:
        print(f"{told.stdout[-2000:]}{told.stderr[-2000:]}\nno counters in {written.name}")
        return 1
    print(f"{len(kernels)} kernels profiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
