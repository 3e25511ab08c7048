"""Which results the benchmarks mark as suspect: logic of bench/machine.py with a driver made up."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import machine
import pytest
from machine import GpuState, suspicions

OWN = 41


class NVMLError(Exception):
    pass


def refuse(*_arguments):
    raise NVMLError


def made_up_driver(**changes):
    """A module like pynvml that knows one GPU."""
    driver = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-1": "handle"}[uuid],
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1755, 2: 3201}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetPowerUsage": lambda handle: 412_500,
        "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 55,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x0,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=OWN)],
    }
    return SimpleNamespace(**(driver | changes))


def test_a_quiet_gpu_is_above_suspicion():
    state = machine.read_gpu(made_up_driver(), "GPU-1")
    assert state == GpuState("NVIDIA H200", "580.1", 1755, 1980, 3201, 412.5, 700.0, 55, 0, [OWN])
    assert suspicions(state, state, OWN) == [] and state.reasons() == []


def test_a_gpu_that_was_idle_before_is_fine():
    quiet = machine.read_gpu(made_up_driver(), "GPU-1")
    idle = machine.read_gpu(
        made_up_driver(nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x1), "GPU-1"
    )
    assert idle.reasons() == ["idle"]
    assert suspicions(idle, quiet, OWN) == []


@pytest.mark.parametrize(
    "bits, words", [(0x4, "power cap"), (0x48, "hardware slowdown"), (0x20, "thermal slowdown")]
)
def test_a_throttled_gpu_is_marked(bits, words):
    quiet = machine.read_gpu(made_up_driver(), "GPU-1")
    slow = machine.read_gpu(
        made_up_driver(nvmlDeviceGetCurrentClocksEventReasons=lambda handle: bits), "GPU-1"
    )
    (*_, last) = found = suspicions(quiet, slow, OWN)
    assert any(words in text for text in found) and last.endswith("after")
    assert suspicions(slow, quiet, OWN)[0].endswith("before")


def test_a_shared_gpu_is_marked():
    others = lambda handle: [SimpleNamespace(pid=OWN), SimpleNamespace(pid=7)]
    shared = machine.read_gpu(made_up_driver(nvmlDeviceGetComputeRunningProcesses=others), "GPU-1")
    assert suspicions(shared, shared, OWN) == ["shared with processes 7"]


def test_a_process_numbered_by_the_host_is_this_one():
    numbered = lambda *pids: lambda handle: [SimpleNamespace(pid=pid) for pid in pids]
    one = made_up_driver(nvmlDeviceGetComputeRunningProcesses=numbered(31000))
    two = made_up_driver(nvmlDeviceGetComputeRunningProcesses=numbered(31000, 32000))
    alone, shared = (machine.read_gpu(driver, "GPU-1") for driver in (one, two))
    assert suspicions(alone, alone, OWN) == []
    assert suspicions(alone, shared, OWN) == ["shared with processes 31000, 32000"]


def test_without_a_driver_the_state_is_unknown():
    assert machine.read_gpu(made_up_driver(nvmlInit=refuse), "GPU-1") is None
    (said,) = suspicions(None, None, OWN)
    assert said.startswith("the GPU's state is unknown: NVML does not answer")


def test_without_the_python_package_the_state_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.current_gpu() is None


def test_what_a_gpu_does_not_tell_is_none():
    driver = made_up_driver(
        nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4,
    )
    del driver.nvmlDeviceGetCurrentClocksEventReasons  # an older pynvml
    state = machine.read_gpu(driver, "GPU-1")
    assert state.power_watts is None and state.clock_event_reasons == 0x4


def test_facts_of_a_cpu_result():
    facts = machine.Watch("cpu").facts()
    assert facts["suspect"] == [] and facts["threads"] >= 1 and len(facts["commit"]) >= 7
