"""The table of steps: what runs where a GPU is, in which order and for how long at most.

What tells most comes first, should the time run out. Steps whose times count run alone; what only
has to be right runs side by side.
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
# From where Python takes this package: the tree, or a folder that shows nothing else of it.
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
OWN_BUDGET = 0.85  # of a step's limit, for what it measures; the rest is for its start


@dataclass(frozen=True)
class Setting:
    """Where the steps run. `standin`: on the CPU, with programs that stand in for the GPU's."""

    work: Path
    standin: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.standin else "cuda"

    @property
    def programs(self) -> str:
        """Folders in which programs are looked for."""
        first = [str(STANDINS)] if self.standin else []
        return os.pathsep.join([*first, os.environ.get("PATH", ""), str(CUDA_BIN)])

    @property
    def environment(self) -> Mapping[str, str]:
        """Of all steps. With a stand-in, what may be missing where the GPU is, is missing."""
        folders = [str(STANDINS / "absent")] if self.standin else []
        folders += [str(IMPORTED_FROM), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(folder for folder in folders if folder)
        made = {"PATH": self.programs, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        made["PYTHONSAFEPATH"] = "1"  # whatever the current folder is
        if self.standin:
            made["CUDA_VISIBLE_DEVICES"] = ""
            made["OMP_NUM_THREADS"] = "1"  # waiting threads are slow on a busy machine
        return made

    def lacks(self, *needs: str) -> str:
        """Why a step cannot run: the modules and programs ("ncu()") among `needs` that are not
        here; empty where all are.
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
    """Processes of the tests."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST_WORKERS, (cores or 1) * 3 // 4))


def test_command(setting: Setting) -> list[str]:
    """The tests of kernels on the GPU, in as many processes as there are cores for."""
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
    """A step whose command, unless another is given, is the module of its name."""
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
    """Small cases under a tool of compute-sanitizer."""
    limit, budget = 70.0, 45.0  # the tool takes its time to start torch
    checked = [*_module("small_cases"), "--device", setting.device, "--out", os.devnull]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += ["--target-processes", "application-only", "--launch-timeout", "50"]
    # torch's own kernels are not ours to check, and there are many of them; nor are the calls
    # with which it finds out what there is.
    command += ["--kernel-name", "kns=fomoe", "--print-limit", "20"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [*checked, "--budget", f"{budget:.0f}"]
    # Each tensor by itself, or what is next to one in torch's pool would be taken for its own.
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
        # What its rivals compile, they compile beside the tests, and beside verbs if need be.
        step("layers", 80, results="layers", flags=("--wait",), early=True),
        step("training", 45, results="training"),
        step("job", 70, "safetensors", results="training", group="checks"),
        *(_check(setting, tool) for tool in CHECKS),
        step("tokens", 30, results="tokens"),
        step("profile", 45, "ncu()", results="profile"),
    ]
