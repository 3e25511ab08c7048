"""`fomoe info` shows the facts of this build and this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fomoe_ext import _C, info

# Of the package under test, which need not be the one in the current folder.
HOME = str(Path(info.__file__).parent.parent)


def run_info(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "fomoe_ext.info", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": HOME, **environment},
    )


def test_json_is_whole():
    result = run_info("--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["run"]["torch"] == torch.__version__
    facts = {"torch", "compiler", "build_type", "cuda", "cuda_archs", "cuda_archs_from", "commit"}
    assert set(told["build"]) == facts
    assert told["native"] == {
        "cpu_library": True,
        "cuda_library": told["native"]["cuda_library"],
        "error": None,
    }
    assert {"route", "compact", "combine", "gemm", "experts"} <= set(told["kernels"]["cpu"])
    assert {"route", "compact", "expand", "contract", "combine"} <= set(told["ops"]["cpu"])
    without = told["build"]["cuda"] is None
    for fact in (told["kernels"]["cuda"], told["build"]["cuda_archs"]):
        assert (fact == []) == without
    assert (told["build"]["cuda_archs_from"] is None) == without


def test_table_names_the_facts():
    result = run_info()
    assert result.returncode == 0, result.stderr
    build = _C.build_facts()
    facts = [torch.__version__, build["compiler"], _C.cpu_features()["chosen"]]
    if build["cuda"] is not None:
        facts += [*build["cuda_archs"], build["cuda_archs_from"]]
    for fact in facts:
        assert fact in result.stdout


@pytest.mark.parametrize("isa", _C.cpu_features()["available"])
def test_an_instruction_set_can_be_chosen(isa):
    told = json.loads(run_info("--json", FOMOE_CPU_ISA=isa).stdout)
    assert told["cpu"]["chosen"] == isa
    assert told["cpu"]["found"] == _C.cpu_features()["found"]


def test_unknown_instruction_set_is_refused():
    result = run_info(FOMOE_CPU_ISA="sse9")
    assert result.returncode == 1
    assert "FOMOE_CPU_ISA" in result.stderr and "sse9" in result.stderr
    assert "Traceback" not in result.stderr


def test_found_features_are_the_processors():
    """What CPUID says, against what the kernel says."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    found = _C.cpu_features()["found"]
    assert _C.cpu_features()["available"][-1] == found
    assert ("avx2" in flags and "fma" in flags and "f16c" in flags) == (found != "scalar")
    wide = all(f in flags for f in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    assert wide == (found in ("avx512", "avx512_bf16"))
    assert (wide and "avx512_bf16" in flags) == (found == "avx512_bf16")


def test_gpus_through_nvml(monkeypatch):
    """A driver with two GPUs, one of which does not tell everything; and no driver at all."""

    class NVMLError(Exception):
        pass

    def memory(handle):
        if handle == 1:
            raise NVMLError
        return types.SimpleNamespace(total=80 * 2**30, free=2**30)

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetName=lambda handle: f"GPU {handle}",
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    first, second = info.list_gpus()
    assert first == {
        "index": 0,
        "name": "GPU 0",
        "memory_bytes": 80 * 2**30,
        "free_bytes": 2**30,
        "compute_capability": "9.0",
        "driver": "580.1",
    }
    assert second["memory_bytes"] is None and second["name"] == "GPU 1"

    def no_driver():
        raise NVMLError

    nvml.nvmlInit = no_driver
    assert info.list_gpus() == []
