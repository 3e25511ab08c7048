"""The bandwidth that benchmarks take for the ceiling: of a kernel on a GPU, not of a copy node."""

from __future__ import annotations

import re

import bench_token_kernels
import common
import pytest
import torch
from bench_command import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe_ext.ops import native

BENCH = ROOT / "bench"
COPIES = ("copy", "clone")  # in the names of operators that may become a memcpy
# Files that copy between two tensors for another reason than to measure a device's bandwidth.
OTHER_COPIES = {"bench_checkpoint.py"}  # CPU memory, which copy_ is right for


class Operators(TorchDispatchMode):
    """Names of what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_ceiling_is_a_kernel_on_a_gpu(device):
    """On tensors of the CPU: which operator is called depends on what `device` says only."""
    source, target = torch.randn(1000), torch.zeros(1000)
    copy = common.copying(source, target, device)
    with Operators() as called:
        copy()
    assert torch.equal(source, target)
    assert len(called.names) == 1
    is_copy = any(name in called.names[0] for name in COPIES)
    assert is_copy == (device == "cpu"), called.names
    wanted = common.COPY_CALLS[device]
    assert called.names[0].removeprefix("aten::").split(".")[0] in wanted


def test_benchmarks_measure_bandwidth_with_that_call():
    found = {path.name for path in BENCH.glob("*.py")
             if re.search(r"target\.copy_\(source\)", path.read_text())}  # fmt: skip
    assert found - OTHER_COPIES == {"common.py"}
    for name in ("bench_token_kernels.py", "bench_outer_codecs.py"):
        assert "common.copying(source, target, DEVICE)" in (BENCH / name).read_text()


@pytest.mark.skipif(not native.cuda_loaded, reason="no GPU, or fomoe_ext was built without CUDA")
def test_a_graph_reaches_what_a_call_reaches():
    """Captured, the ceiling's call is as fast as it is outside of a graph."""
    source = torch.ones(1 << 28, device="cuda")
    copy = common.copying(source, torch.empty_like(source), "cuda")
    calls = {"eager": copy, "graph": common.captured(copy)}
    seconds = common.interleaved_seconds(calls, "cuda")
    assert seconds["graph"] < 1.1 * seconds["eager"]
    assert bench_token_kernels.copy_bandwidth() > 0.9 * 2 * source.nbytes / seconds["eager"]
