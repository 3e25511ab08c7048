"""Shared by the benchmarks: shapes, inputs, interleaved timing, and rates of the machine.

Machines change their clock and run other work, so only times taken close together can be compared.
Every round of a benchmark therefore times the rivals and a dense matmul first, then ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fomoe_ext import ops

DENSE_SIZE = 2048  # size of the square matmul that gives the rate of the machine
RIVAL_SECONDS = 2.5  # a rival that would take longer gets fewer tokens
CASE_SECONDS = 12.0  # time for all rounds of a case; there are at least MIN_ROUNDS
MIN_ROUNDS, MAX_ROUNDS = 3, 7


@dataclass(frozen=True)
class Shape:
    """Sizes of an MoE layer: tokens, hidden size, intermediate size, experts, slots per token."""

    tokens: int
    hidden: int
    expert: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.expert} {self.top_k}/{self.experts}"


SHAPES = (
    Shape(4096, 512, 256, 32, 4),
    Shape(4096, 1024, 512, 16, 2),
    Shape(8192, 512, 128, 64, 8),
)
DTYPES = (torch.float32, torch.bfloat16)
RESIDENCIES = ("all", "half")


@dataclass
class Problem:
    """Inputs of an expert layer (SwiGLU) with random routing; every second expert for "half"."""

    shape: Shape
    x: Tensor  # [T, D]
    logits: Tensor  # fp32 [T, E]
    weights: Tensor  # fp32 [T, K]
    experts: Tensor  # int32 [T, K]
    resident_index: Tensor  # int32 [E]
    expand_weight: Tensor  # [R, 2 N, D]
    contract_weight: Tensor  # [R, D, N]
    grad_y: Tensor  # [T, D]
    table: ops.RowTable = field(init=False)
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.table = ops.compact(self.experts, self.resident_index, self.residents)
        self.rows = int(self.table.offsets[-1])

    @property
    def residents(self) -> int:
        return self.expand_weight.shape[0]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that need gradients."""
        return self.x, self.weights, self.expand_weight, self.contract_weight

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward: three times those of the forward's gate, up and down."""
        return 3 * self.rows * 6 * self.shape.hidden * self.shape.expert

    @property
    def least_bytes(self) -> int:
        """Bytes if inputs are read once, results written once, pre-activations once each."""
        size, s = self.x.element_size(), self.shape
        pre_activations = 2 * self.rows * 2 * s.expert * size
        tokens = 4 * self.x.numel() * size  # x, grad_y; y, grad_x
        return 2 * sum(w.nbytes for w in self.leaves[1:]) + tokens + pre_activations


def make_problem(
    shape: Shape, dtype: torch.dtype, residency: str, tokens: int | None = None
) -> Problem:
    """Random inputs from a fixed seed; with `tokens` only the first so many tokens of them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator)
    residents = shape.experts if residency == "all" else shape.experts // 2
    logits = draw(shape.tokens, shape.experts)[:tokens]
    weights, experts = ops.route(logits, shape.top_k)
    index = torch.full((shape.experts,), -1, dtype=torch.int32)
    index[:: shape.experts // residents] = torch.arange(residents, dtype=torch.int32)
    expand = draw(residents, 2 * shape.expert, shape.hidden) * shape.hidden**-0.5
    contract = draw(residents, shape.hidden, shape.expert) * shape.expert**-0.5
    return Problem(
        shape=shape,
        x=draw(shape.tokens, shape.hidden)[:tokens].to(dtype).requires_grad_(),
        logits=logits.requires_grad_(),
        weights=weights.requires_grad_(),
        experts=experts,
        resident_index=index,
        expand_weight=expand.to(dtype).requires_grad_(),
        contract_weight=contract.to(dtype).requires_grad_(),
        grad_y=draw(shape.tokens, shape.hidden)[:tokens].to(dtype),
    )


# ---- the machine ---------------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@cache
def _dense_operands(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)


def dense_rate(dtype: torch.dtype, size: int = DENSE_SIZE) -> float:
    """FLOP/s of one square torch.matmul, measured now."""
    left, right = _dense_operands(dtype, size)
    return 2 * size**3 / seconds_of(lambda: left @ right)


@cache
def torch_rate(dtype: torch.dtype) -> float:
    """FLOP/s of torch.matmul in this dtype, measured once. The size is small because bf16 can be
    100 times slower than fp32."""
    return max(dense_rate(dtype, 512) for _ in range(5))


@cache
def dense_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the dense matmul to compare with: this one, or fp32 if that is faster.

    On a CPU without bf16 instructions torch's bf16 matmul is too slow to compare with.
    """
    return max((dtype, torch.float32), key=torch_rate)


# The call that measures the bandwidth of each device; it is recorded with the results.
COPY_CALLS = {"cuda": "torch.mul(source, 1, out=target)", "cpu": "target.copy_(source)"}


def copying(source: Tensor, target: Tensor, device: str) -> Callable[[], Any]:
    """A call that reads `source` and writes `target` as fast as a kernel can.

    On a GPU it is not copy_, which becomes a copy node in a CUDA graph: on an H200 such a node
    moves 2.7 TB/s, a kernel 4.25 TB/s.
    """
    if device == "cpu":
        return lambda: target.copy_(source)
    return lambda: torch.mul(source, 1, out=target)


@cache
def memory_bandwidth() -> float:
    """Bytes read and written per second by a copy of 256 MiB on the CPU: the median of five."""
    source = torch.ones(64 << 20)
    copy = copying(source, torch.zeros_like(source), "cpu")
    return median(2 * source.nbytes / seconds_of(copy) for _ in range(5))


def affordable_tokens(problem: Problem, dtype: torch.dtype) -> int:
    """How many tokens a rival computes: so many that a pass takes about RIVAL_SECONDS. If torch has
    a fast matmul in this dtype, all of them, because fewer rows per expert would slow the rival.
    """
    if 8 * torch_rate(dtype) > torch_rate(torch.float32):
        return problem.shape.tokens
    tokens, seconds = problem.shape.tokens, problem.flops / torch_rate(dtype)
    while seconds > RIVAL_SECONDS and tokens > 64:
        tokens, seconds = tokens // 2, seconds / 2
    return tokens


# ---- timing --------------------------------------------------------------------------------------


def interleave(
    benchmark: Any, ours: Callable[[], Any], others: dict[str, Callable[[], float]]
) -> tuple[float, dict[str, float]]:
    """Measures in rounds: each of `others` in turn, then ours. `others` return their own measure.

    Returns the median seconds of ours (0 with --benchmark-disable) and the medians of the others.
    """
    measures: dict[str, list[float]] = {name: [] for name in others}

    def run_others() -> None:
        for name, run in others.items():
            measures[name].append(run())

    round_seconds = seconds_of(run_others) + seconds_of(ours)  # also the warm-up
    for values in measures.values():
        values.clear()
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(CASE_SECONDS / round_seconds)))
    benchmark.pedantic(ours, setup=run_others, rounds=rounds)
    seconds = 0.0 if benchmark.disabled else benchmark.stats.stats.median
    return seconds, {name: median(values) for name, values in measures.items()}


# ---- timing on any device ------------------------------------------------------------------------

INTERLEAVED_ROUNDS = 9
MIN_MEASURED_SECONDS = 2e-3  # on a GPU: shorter calls are repeated


def device_seconds(run: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Mean seconds of a call over `repeats`: by events on a GPU, else wall time."""
    if device == "cpu":
        return seconds_of(lambda: [run() for _ in range(repeats)]) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A call that replays `run` from a CUDA graph. RuntimeError if `run` waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture needs a warm-up on another stream
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def interleaved_seconds(
    calls: dict[str, Callable[[], Any]], device: str, rounds: int = INTERLEAVED_ROUNDS
) -> dict[str, float]:
    """Median seconds of each call. After a warm-up every round times all of them in turn."""
    repeats = {}
    for name, call in calls.items():
        device_seconds(call, device)
        once = device_seconds(call, device)
        repeats[name] = max(1, min(20, int(MIN_MEASURED_SECONDS / once))) if device == "cuda" else 1
    measures: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            measures[name].append(device_seconds(call, device, repeats[name]))
    return {name: median(values) for name, values in measures.items()}


# ---- memory --------------------------------------------------------------------------------------


def kept_bytes(run: Callable[[], Any], known: Sequence[Tensor]) -> int:
    """Bytes of float tensors that autograd saves for the backward of `run`, without `known`."""
    own = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak bytes that `run` allocates on the GPU, without what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- comparing -----------------------------------------------------------------------------------


def normalised_error(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of `wanted`."""
    error = size = 0.0
    # In pieces, because fp64 copies of large tensors would not fit into memory.
    pieces = zip(*(t.detach().flatten().split(1 << 26) for t in (got, wanted)), strict=True)
    for mine, theirs in pieces:
        mine, theirs = mine.double(), theirs.double()
        error += float((mine - theirs).square().sum())
        size += float(theirs.square().sum())
    return (error / size) ** 0.5


def assert_same(got: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Floats agree within a few roundings of their dtype, integers exactly."""
    limits = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        if not mine.is_floating_point():
            assert torch.equal(mine, theirs)
            continue
        assert normalised_error(mine, theirs) < limits[dtype]


# ---- results -------------------------------------------------------------------------------------

Case = tuple[Shape, torch.dtype, str]  # shape, dtype, residency
layer_results: dict[Case, dict[str, float]] = {}
verb_results: dict[tuple[str, Case], dict[str, float]] = {}
token_results: list[dict[str, Any]] = []  # of bench_token_kernels.py
hf_results: list[dict[str, Any]] = []  # of bench_hf.py


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
