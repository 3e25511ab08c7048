"""`fomoe info`: what this build is, what this machine has, and which kernels would run."""

from __future__ import annotations

import json as json_module
import platform
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console

from fomoe_ext.launch.console import write_any_character
from fomoe_ext.report.tables import ReportTable, print_tables
from fomoe_ext.version import VERSION


def list_gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs the driver knows, whether torch can use them or not; empty without a driver.

    Each a dict: index, name, memory_bytes, free_bytes, compute_capability ("9.0"), driver. What a
    GPU does not tell is None.
    """
    import pynvml

    def ask(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except pynvml.NVMLError:
            return None

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        gpus = []
        for index in range(ask(pynvml.nvmlDeviceGetCount) or 0):
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
            capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
            gpus.append(
                {
                    "index": index,
                    "name": ask(pynvml.nvmlDeviceGetName, handle),
                    "memory_bytes": memory and memory.total,
                    "free_bytes": memory and memory.free,
                    "compute_capability": capability and ".".join(map(str, capability)),
                    "driver": ask(pynvml.nvmlSystemGetDriverVersion),
                }
            )
        return gpus
    finally:
        ask(pynvml.nvmlShutdown)


def registered_ops(dispatch_key: str) -> list[str]:
    """Verbs of `torch.ops.fomoe` that have a kernel for "CPU" or "CUDA", sorted."""
    import torch

    names = torch._C._dispatch_get_registrations_for_dispatch_key(dispatch_key)
    return sorted(name.removeprefix("fomoe::") for name in names if name.startswith("fomoe::"))


def collect_info() -> dict[str, Any]:
    """Everything `fomoe info` tells, as plain data.

    Raises ImportError when the package is not built and RuntimeError when FOMOE_CPU_ISA names an
    instruction set that is unknown or not there. A library that does not load is told under
    "native".
    """
    from fomoe_ext import _C

    cpu = _C.cpu_features()

    import torch

    native: dict[str, Any] = {"cpu_library": True, "cuda_library": False, "error": None}
    try:
        from fomoe_ext.ops import native as loaded

        native["cuda_library"] = loaded.cuda_loaded
    except (ImportError, OSError) as error:
        native.update(cpu_library=False, error=str(error))
    return {
        "version": VERSION,
        "libraries": str(_C.FOLDER),
        "build": _C.build_facts(),
        "run": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cuda_available": torch.cuda.is_available(),
            "threads": torch.get_num_threads(),
        },
        "cpu": {"machine": platform.machine(), **cpu},
        "kernels": {"cpu": _C.cpu_kernels(), "cuda": _C.cuda_kernels()},
        "native": native,
        "ops": {"cpu": registered_ops("CPU"), "cuda": registered_ops("CUDA")},
        "gpus": list_gpus(),
    }


def _kernel_list(kernels: dict[str, list[str]]) -> str:
    return ", ".join(
        verb if isas == ["scalar"] else f"{verb} ({', '.join(isas)})"
        for verb, isas in sorted(kernels.items())
    )


def _gpu_line(gpu: dict[str, Any]) -> str:
    memory = gpu["memory_bytes"]
    size = "" if memory is None else f", {memory / 2**30:.0f} GiB"
    return f"{gpu['name']}{size}, sm {gpu['compute_capability']}, driver {gpu['driver']}"


def _rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    build, run, cpu = info["build"], info["run"], info["cpu"]
    cuda = "no (CPU only)"
    if build["cuda"] is not None:
        cuda = f"{build['cuda']} for {', '.join(build['cuda_archs'])} ({build['cuda_archs_from']})"
    seen = f"CUDA {run['torch_cuda']}" if run["cuda_available"] else "no GPU in use"
    rows = [
        ("fomoe_ext", f"{info['version']}, commit {build['commit']}"),
        ("libraries", info["libraries"]),
        ("built with", f"torch {build['torch']}, {build['compiler']}, {build['build_type']}"),
        ("built for CUDA", cuda),
        ("running on", f"Python {run['python']}, torch {run['torch']}, {seen}"),
        ("CPU", f"{cpu['machine']}, found {cpu['found']}, using {cpu['chosen']}"),
        ("threads", str(run["threads"])),
        ("CPU kernels", _kernel_list(info["kernels"]["cpu"])),
        ("CUDA kernels", ", ".join(info["kernels"]["cuda"]) or "none"),
        ("CPU ops", ", ".join(info["ops"]["cpu"]) or "none"),
        ("CUDA ops", ", ".join(info["ops"]["cuda"]) or "none"),
    ]
    rows += [(f"GPU {gpu['index']}", _gpu_line(gpu)) for gpu in info["gpus"]] or [("GPUs", "none")]
    if info["native"]["error"] is not None:
        rows.append(("problem", info["native"]["error"]))
    return rows


def info_table(info: dict[str, Any]) -> ReportTable:
    """The table of `collect_info`'s facts."""
    return ReportTable("Build, machine and kernels", ("", ""), tuple(_rows(info)), texts=(0, 1))


def print_info(json: bool = False) -> None:
    """What this build is, what this machine has, and which kernels would run.

    Args:
        json: Print one JSON object instead of a table.
    """
    info = collect_info()
    if json:
        print(json_module.dumps(info, indent=2))
        return
    print_tables([info_table(info)], Console())


def main(argv: Sequence[str] | None = None) -> int:
    """`fomoe info [--json]`; returns the exit status: 1, with a line on stderr, when it fails."""
    write_any_character()
    try:
        tyro.cli(print_info, args=argv, prog="fomoe info")
    except (ImportError, RuntimeError) as error:
        print(f"fomoe info: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
