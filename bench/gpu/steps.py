"""The steps that run on a machine with a GPU, their order and their time limits.

The most important steps come first, in case the time runs out. Steps that measure time run alone;
those that only check results run concurrently.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.gpu.runner import Step

ROOT = Path(__file__).resolve().parents[2]
# Where Python imports this package from: the source tree, or a folder with nothing else of it.
IMPORTED_FROM = Path(__file__).absolute().parents[2]
STANDINS = Path(__file__).parent / "standins"
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
KERNEL_TESTS = tuple(
    str(ROOT / f"tests/{name}.py")
    for name in (
        "ops/test_route_kernel",
        "ops/test_compact_kernel",
        "ops/test_rows_kernel",
        "ops/test_combine_kernel",
        "ops/test_experts_kernel",
        "ops/test_expert_tiles",
        "ops/test_delta",
        "ops/test_delta_kernel",
        "ops/test_cuda_graph",
        "emulator/test_emulator",
    )
)
CHECKS = ("memcheck", "racecheck", "synccheck")
MOST_WORKERS = 12  # of the tests: each takes memory of the GPU
OWN_BUDGET = 0.85  # fraction of a step's limit for measuring; the rest is for starting


@dataclass(frozen=True)
class Setting:
    """Where the steps run. `standin`: on the CPU, with stand-ins for the GPU's programs."""

    work: Path
    standin: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.standin else "cuda"

    @property
    def programs(self) -> str:
        """PATH: the folders with programs."""
        first = [str(STANDINS)] if self.standin else []
        return os.pathsep.join([*first, os.environ.get("PATH", ""), str(CUDA_BIN)])

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment of all steps. With stand-ins it hides packages that a machine with a GPU may
        lack."""
        folders = [str(STANDINS / "absent")] if self.standin else []
        folders += [str(IMPORTED_FROM), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(folder for folder in folders if folder)
        made = {"PATH": self.programs, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        made["PYTHONSAFEPATH"] = "1"  # does not import from the current folder
        if self.standin:
            made["CUDA_VISIBLE_DEVICES"] = ""
            made["OMP_NUM_THREADS"] = "1"  # on a busy machine waiting threads take time
        return made

    def lacks(self, *needs: str) -> str:
        """Why a step cannot run: which modules and programs ("ncu()") of `needs` are missing; "" if
        none is.
        """
        missing = [
            need.removesuffix("()")
            for need in needs
            if (
                shutil.which(need.removesuffix("()"), path=self.programs) is None
                if need.endswith("()")
                else importlib.util.find_spec(need) is None
            )
        ]
        return f"no {', '.join(missing)} here" if missing else ""


def workers() -> int:
    """Number of processes for the tests."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_WORKERS, (cores or 1) * 3 // 4))


def test_command(setting: Setting) -> list[str]:
    """The tests of kernels on the GPU, in several processes."""
    wanted = "cuda or graph or hardware"
    if setting.standin:
        wanted = "(cpu or graph or hardware) and not emulated"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if not setting.lacks("xdist"):
        command += ["-n", str(workers())]
    return [*command, *KERNEL_TESTS, "-k", wanted]


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", f"bench.gpu.{name}"]


def _step(
    setting: Setting,
    name: str,
    limit: float,
    *needs: str,
    command: list[str] | None = None,
    results: str = "",
    flags: tuple[str, ...] = (),
    group: str = "",
    early: bool = False,
    more: Mapping[str, str] | None = None,
) -> Step:
    """A step. Unless `command` is given, it runs the module of its name."""
    out = setting.work / f"{results or name}.jsonl"
    budget = f"{OWN_BUDGET * limit:.0f}"
    own = [*_module(name), "--device", setting.device, "--out", str(out), "--budget", budget]
    return Step(
        name,
        command or [*own, *flags],
        limit,
        group or name,
        results,
        {**setting.environment, **(more or {})},
        early,
        setting.lacks(*needs),
    )


def _check(setting: Setting, tool: str) -> Step:
    """The small cases under a tool of compute-sanitizer."""
    limit, budget = 70.0, 45.0  # the tool takes its time to start torch
    checked = [*_module("small_cases"), "--device", setting.device, "--out", os.devnull]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += ["--target-processes", "application-only", "--launch-timeout", "50"]
    # Neither torch's own kernels nor its API calls that probe the device are checked.
    command += ["--kernel-name", "kns=fomoe", "--print-limit", "20"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [*checked, "--budget", f"{budget:.0f}"]
    # Without torch's memory pool, in which an access past a tensor's end would not be noticed.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    needs = "compute-sanitizer()"
    return _step(setting, tool, limit, needs, command=command, group="checks", more=more)


def make_steps(setting: Setting) -> list[Step]:
    """All steps, in order."""
    step = partial(_step, setting)
    build = Step(
        "build",
        [*_module("build"), setting.device],
        240.0,
        "build",
        environment=setting.environment,
        needed=True,
    )
    return [
        build,
        step("tests", 80, "pytest", "hypothesis", command=test_command(setting)),
        step("verbs", 100, results="verbs"),
        # Starts early: rivals compile while the tests run, and while verbs runs if need be.
        step("layers", 80, results="layers", flags=("--wait",), early=True),
        step("training", 45, results="training"),
        step("job", 70, "safetensors", results="training", group="checks"),
        *(_check(setting, tool) for tool in CHECKS),
        step("tokens", 30, results="tokens"),
        step("profile", 45, "ncu()", results="profile"),
    ]
