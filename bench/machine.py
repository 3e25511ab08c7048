"""Facts about the machine that are recorded with every result, and reasons to doubt a result.

If a GPU lowered its clock, or another process used it, a time says little about the kernel. So NVML
is asked before and after each measurement, and such results are marked as suspect.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fomoe_ext import _C

# Bits of NVML's clock event reasons (nvml.h). Those in SLOWING reduce the clock.
REASONS = {
    0x1: "idle",
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "kept in step with other GPUs",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
SLOWING = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


@dataclass(frozen=True)
class GpuState:
    """What NVML reported at one moment; None for what it did not report."""

    name: str | None = None
    driver: str | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_celsius: int | None = None
    clock_event_reasons: int | None = None
    processes: list[int] = field(default_factory=list)  # ids of processes that compute on the GPU

    def reasons(self) -> list[str]:
        """The clock event reasons in words."""
        bits = self.clock_event_reasons or 0
        return [text for bit, text in REASONS.items() if bits & bit]


def read_gpu(nvml: Any, uuid: str) -> GpuState | None:
    """The state of the GPU with this UUID; None without a driver. `nvml`: the module pynvml."""

    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return None
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # its name before driver 535
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    watts = lambda milliwatts: None if milliwatts is None else milliwatts / 1000
    processes = ask("nvmlDeviceGetComputeRunningProcesses", handle) or []
    return GpuState(
        name=ask("nvmlDeviceGetName", handle),
        driver=ask("nvmlSystemGetDriverVersion"),
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", handle, 1),
        max_sm_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", handle, 1),
        memory_clock_mhz=ask("nvmlDeviceGetClockInfo", handle, 2),
        power_watts=watts(ask("nvmlDeviceGetPowerUsage", handle)),
        power_limit_watts=watts(ask("nvmlDeviceGetEnforcedPowerLimit", handle)),
        temperature_celsius=ask("nvmlDeviceGetTemperature", handle, 0),
        clock_event_reasons=reasons,
        processes=[process.pid for process in processes],
    )


def suspicions(before: GpuState | None, after: GpuState | None, own_pid: int) -> list[str]:
    """Reasons to doubt a result that was measured between the two states."""
    if before is None or after is None:
        return ["the GPU's state is unknown: NVML does not answer (needs nvidia-ml-py)"]
    found = []
    for state, when in ((before, "before"), (after, "after")):
        slowed = (state.clock_event_reasons or 0) & SLOWING
        found += [f"{text} {when}" for bit, text in REASONS.items() if slowed & bit]
    others = sorted({*before.processes, *after.processes} - {own_pid})
    # In a container NVML may report the host's process ids: then a single other id is our own.
    alone = len(others) == 1 and own_pid not in {*before.processes, *after.processes}
    if others and not alone:
        found.append(f"shared with processes {', '.join(map(str, others))}")
    return found


def current_gpu() -> GpuState | None:
    """The state of torch's current GPU; None without nvidia-ml-py or if NVML does not answer."""
    try:
        import pynvml
    except ImportError:
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return read_gpu(pynvml, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


class Watch:
    """Made before a measurement; `facts()` after it gives the machine's facts for `extra_info`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = current_gpu() if device == "cuda" else None

    def facts(self) -> dict[str, Any]:
        """Machine, commit and versions; `suspect` lists reasons to doubt the result."""
        build = _C.build_facts()
        facts: dict[str, Any] = {
            "device": self.device,
            "commit": build["commit"],
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "built_with_cuda": build["cuda"],
            "suspect": [],
        }
        if self.device == "cpu":
            threads = torch.get_num_threads()
            return facts | {"threads": threads, "isa": _C.cpu_features()["chosen"]}
        after = current_gpu()
        facts["suspect"] = suspicions(self.before, after, os.getpid())
        for key, state in (("gpu_before", self.before), ("gpu", after)):
            if state is not None:
                facts[key] = asdict(state) | {"reasons": state.reasons()}
        return facts
