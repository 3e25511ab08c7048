"""How the driver is run: under which sanitizers, in which schedules. Tests and mutants alike."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_SECONDS = 300

# Which files and folders of csrc/cuda each of the driver's parts runs.
PARTS = {
    "route": ("route",),
    "compact": ("rows/compact.cu",),
    "rows": ("rows/combine.cu", "rows/combine_backward.cu", "rows/gather.cu", "rows/scatter.cuh"),
    "experts": ("gemm",),
    "delta": ("delta",),
}


@dataclass(frozen=True)
class Run:
    """One run of the driver: its arguments and its schedule."""

    order: str
    seed: int = 1
    resident: int = 4
    arrival: str = "late"
    small: bool = False

    def environment(self) -> dict[str, str]:
        return {
            "FOMOE_EMULATOR_ORDER": self.order,
            "FOMOE_EMULATOR_SEED": str(self.seed),
            "FOMOE_EMULATOR_RESIDENT": str(self.resident),
            "FOMOE_EMULATOR_ASYNC": self.arrival,
        }

    def command(self, program: Path, parts: Sequence[str] = ()) -> list[str]:
        return [str(program), *(["--small"] if self.small else []), *parts]

    def text(self, program: Path) -> str:
        """As a line for a shell that brings the run back."""
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        return " ".join([*variables, *self.command(program)])


# By sanitizers; plain: none, for bugs that show in results. The thread sanitizer makes a fiber per
# CUDA thread and block: small cases there.
RUNS: dict[str, list[Run]] = {
    "plain": [
        Run("forward", resident=1, arrival="early"),
        Run("reverse"),
        Run("random", seed=1),
        Run("random", seed=2, resident=1, arrival="random"),
        Run("priority", seed=1),
        Run("priority", seed=2),
        Run("priority", seed=3, resident=1),
        Run("laggard", seed=2, arrival="random"),
    ],
    "thread": [Run("forward", small=True), Run("priority", seed=1, small=True)],
    "address,undefined": [Run("random", seed=1), Run("reverse", resident=1, small=True)],
}


def seeded_runs(base: int, count: int) -> list[Run]:
    """Runs with the seeds from `base` on, for what shows in few of all orders: every third holds a
    thread of each block back, which shows most, and runs all cases; the others run the small ones.
    """
    orders, arrivals = ("laggard", "random", "priority"), ("late", "random", "early")
    return [
        Run(
            order=orders[i % 3],
            seed=base + i,
            resident=(1, 4)[i % 2],
            arrival=arrivals[i // 3 % 3],
            small=orders[i % 3] != "laggard",
        )
        for i in range(count)
    ]


def failure_of(program: Path, run: Run, parts: list[str]) -> str | None:
    """What a run of the driver had to complain about; None when all is well."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_bugs=1",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }
    try:
        result = subprocess.run(
            run.command(program, parts),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, **options, **run.environment()},
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT_SECONDS} s"
    if result.returncode == 0:
        return None
    return f"status {result.returncode}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"


def first_failure(program: Path, runs: Sequence[Run]) -> str | None:
    """The first run of all of the driver's parts that fails, and why; several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = pool.map(lambda run: failure_of(program, run, []), runs)
        for run, failure in zip(runs, failures, strict=True):
            if failure is not None:
                return f"{run.text(program)}\n{failure}"
    return None
