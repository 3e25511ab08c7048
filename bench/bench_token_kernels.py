"""The kernels around the expert GEMMs at the sizes of real models: route, compact, gather, combine
and its backward. On a GPU if there is one, else on the CPU with the smallest sizes.

They mostly move bytes: their lower bound on time ("floor") is the bytes that must be read and
written over the bandwidth of a copy in the same run. A second one, FLOPs over the rate of an fp32
matmul, is printed beside it. Rivals: plain torch ops and, on a GPU, the same under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import common
import machine
import pytest
import torch
from torch import Tensor

from fomoe_ext import ops
from fomoe_ext.ops import native

DEVICE = "cuda" if native.cuda_loaded else "cpu"
Size = tuple[int, int, int]
SIZES: list[Size] = [
    (4096, 64, 8),
    (16384, 128, 8),
    (65536, 256, 8),
    (65536, 32, 4),
]  # tokens, experts, top-k
HIDDENS = [2048, 7168]
if DEVICE == "cpu":
    SIZES, HIDDENS = SIZES[:1], HIDDENS[:1]
CACHE_BYTES = 180 << 20  # inputs in turn exceed this: no kernel finds its inputs in cache
MOST_SETS, ROUNDS = 1536, 9

by_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}-top{s[2]}")
by_hidden = pytest.mark.parametrize("hidden", HIDDENS)


# ---- timing --------------------------------------------------------------------------------------


class Timer:
    """Times calls that cycle through several inputs; on a GPU with events around a CUDA graph."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self.calls = calls
        self.graph: torch.cuda.CUDAGraph | None = None
        self._run_all()  # warm-up, compilation
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            self._capture()
            self.seconds()

    def _run_all(self) -> None:
        for call in self.calls:
            call()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run_all()
        except RuntimeError:  # a call that waits for the device is timed without a graph
            torch.cuda.synchronize()
            return
        self.graph = graph

    def run(self) -> None:
        """Runs all calls once and waits for the device."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run_all()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def seconds(self) -> float:
        """Seconds of one call: the mean over one pass through all inputs."""
        if DEVICE == "cpu":
            return common.seconds_of(self._run_all) / len(self.calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run_all()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(self.calls)


@cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device (common.COPY_CALLS)."""
    source = torch.ones((1 << 30 if DEVICE == "cuda" else 1 << 27) // 4, device=DEVICE)
    target = torch.empty_like(source)
    timer = Timer([common.copying(source, target, DEVICE)])
    return 2 * source.nbytes / median(timer.seconds() for _ in range(ROUNDS))


@cache
def compute_rate() -> float:
    """FLOP/s of an fp32 matmul on the device."""
    size = 4096 if DEVICE == "cuda" else 1024
    left, right = (torch.randn(size, size, device=DEVICE) for _ in range(2))
    timer = Timer([lambda: left @ right])
    return 2 * size**3 / median(timer.seconds() for _ in range(ROUNDS))


@dataclass
class Work:
    """What a benchmark compares: functions that each take one of the input sets."""

    verb: str
    shape: str
    least_bytes: int
    flops: int
    inputs: Callable[[int], tuple]  # from a seed
    ours: Callable[..., tuple[Tensor, ...]]
    theirs: Callable[..., tuple[Tensor, ...]]
    dtype: torch.dtype


def measure(benchmark: Any, work: Work) -> None:
    first = work.inputs(0)
    common.assert_same(work.ours(*first), work.theirs(*first), work.dtype)
    sets = max(1, min(MOST_SETS, -(-CACHE_BYTES // sum(t.nbytes for t in first))))
    inputs = [first, *(work.inputs(seed) for seed in range(1, sets if DEVICE == "cuda" else 1))]
    timer_of = lambda function: Timer([lambda i=i: function(*i) for i in inputs])
    timers, failed = {"ours": timer_of(work.ours), "torch": timer_of(work.theirs)}, None
    if DEVICE == "cuda":
        try:
            torch.compiler.reset()  # versions of earlier cases count against a limit
            # fullgraph: otherwise it would silently run uncompiled.
            compiled = torch.compile(work.theirs, dynamic=False, fullgraph=True)
            common.assert_same(work.ours(*first), compiled(*first), work.dtype)
            timers["compiled"] = timer_of(compiled)
        except Exception as error:  # a compiler may raise anything; the result names it
            failed = f"{type(error).__name__}: {str(error)[:200]}"
    watch = machine.Watch(DEVICE)
    measures: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            measures[name].append(timer.seconds())
    benchmark.pedantic(timers["ours"].run, rounds=3)
    seconds = {name: median(values) for name, values in measures.items()}
    memory_floor = work.least_bytes / copy_bandwidth()
    result = {
        "seconds": seconds["ours"],
        "memory_floor_seconds": memory_floor,
        "compute_floor_seconds": work.flops / compute_rate(),
        "fraction_of_floor": memory_floor / seconds["ours"],
        "copy_bytes_per_second": copy_bandwidth(),
        "copy_call": common.COPY_CALLS[DEVICE],
        "calls_per_round": len(inputs),
        "in_a_graph": timers["ours"].graph is not None,
        **{f"{name}_seconds": value for name, value in seconds.items() if name != "ours"},
        "compiled_failed": failed,
    }
    facts = watch.facts()
    benchmark.extra_info.update(result, machine=facts, least_bytes=work.least_bytes)
    common.token_results.append({"verb": work.verb, "shape": work.shape, **result, **facts})


def random_on_device(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return lambda *sizes: torch.randn(*sizes, generator=generator, device=DEVICE)


def random_logits(tokens: int, experts: int, seed: int) -> Tensor:
    """Values in -4 .. 4, in random order for each token. There are no ties, neither in bfloat16 nor
    in the scores, because rivals break ties differently.
    """
    return random_on_device(seed)(tokens, experts).argsort(1) * (8 / experts) - 4


# ---- route and compact ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=common.dtype_name)
@by_size
def test_token_kernels_route(benchmark: Any, size: Size, dtype: torch.dtype) -> None:
    """Sigmoid scores and their top-k, without gradient."""
    tokens, experts, top_k = size

    def theirs(logits: Tensor) -> tuple[Tensor, ...]:
        weights, chosen = logits.float().sigmoid().topk(top_k, dim=1)
        return weights, chosen.int()

    measure(
        benchmark,
        Work(
            "route",
            f"{tokens}x{experts} top {top_k} {common.dtype_name(dtype)}",
            least_bytes=tokens * (experts * dtype.itemsize + 8 * top_k),
            flops=tokens * experts,
            inputs=lambda seed: (random_logits(tokens, experts, seed).to(dtype),),
            ours=lambda logits: ops.route(logits, top_k),
            theirs=theirs,
            dtype=torch.float32,
        ),
    )


def resident_half(experts: int) -> Tensor:
    """Every second expert is resident."""
    index = torch.full((experts,), -1, dtype=torch.int32)
    index[::2] = torch.arange(experts // 2, dtype=torch.int32)
    return index.to(DEVICE)


def chosen_experts(tokens: int, experts: int, top_k: int, seed: int) -> Tensor:
    return random_on_device(seed)(tokens, experts).topk(top_k, dim=1).indices.int()


def sorted_rows(experts: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """slot_of_row and offsets[1:] of the row table, by a sort."""
    num_resident = index.shape[0] // 2
    resident = index[experts.flatten().long()]
    key = torch.where(resident < 0, num_resident, resident)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(num_resident + 1, dtype=torch.int64, device=key.device)
    counts = counts.scatter_add(0, key.long(), torch.ones_like(key, dtype=torch.int64))
    ends = counts[:-1].cumsum(0)
    past = torch.arange(order.shape[0], device=order.device) >= ends[-1]
    return order.masked_fill(past, -1).int(), ends.int()


def compacted(experts: Tensor, index: Tensor) -> ops.RowTable:
    return ops.compact(experts, index, index.shape[0] // 2, 128)


def our_rows(experts: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same as `sorted_rows`. All outputs are compared, so that torch.compile cannot
    remove one that is not used."""
    table = compacted(experts, index)
    return table.slot_of_row, table.offsets[1:]


@by_size
def test_token_kernels_compact(benchmark: Any, size: Size) -> None:
    """Row tables, offsets and tile schedule; half the experts resident."""
    tokens, experts, top_k = size
    index = resident_half(experts)
    measure(
        benchmark,
        Work(
            "compact",
            f"{tokens}x{experts} top {top_k}",
            least_bytes=16 * tokens * top_k,  # ids in, three tables out
            flops=0,
            inputs=lambda seed: (chosen_experts(tokens, experts, top_k, seed),),
            ours=lambda chosen: our_rows(chosen, index),
            theirs=lambda chosen: sorted_rows(chosen, index),
            dtype=torch.int32,
        ),
    )


def test_token_kernels_route_and_compact(benchmark: Any) -> None:
    """route and compact in turn with 4096 tokens, where kernel launches are a large part."""
    tokens, experts, top_k = 4096, 128, 8
    index = resident_half(experts)

    def ours(logits: Tensor) -> tuple[Tensor, ...]:
        weights, chosen = ops.route(logits, top_k)
        return weights, *our_rows(chosen, index)

    def theirs(logits: Tensor) -> tuple[Tensor, ...]:
        weights, chosen = logits.sigmoid().topk(top_k, dim=1)
        return weights, *sorted_rows(chosen.int(), index)

    measure(
        benchmark,
        Work(
            "route + compact",
            f"{tokens}x{experts} top {top_k}",
            least_bytes=tokens * (4 * experts + 8 * top_k + 12 * top_k),
            flops=tokens * experts,
            inputs=lambda seed: (random_logits(tokens, experts, seed),),
            ours=ours,
            theirs=theirs,
            dtype=torch.float32,
        ),
    )


# ---- gather, combine and its backward ------------------------------------------------------------


@cache
def routing(size: Size) -> tuple[ops.RowTable, Tensor, Tensor, int]:
    """Row table, slots and tokens of the rows as indices for torch, and the number of rows."""
    tokens, experts, top_k = size
    table = compacted(chosen_experts(tokens, experts, top_k, 99), resident_half(experts))
    rows = int(table.offsets[-1])
    slots = table.slot_of_row[:rows].long()
    return table, slots, slots // top_k, rows


@by_hidden
@by_size
def test_token_kernels_gather(benchmark: Any, size: Size, hidden: int) -> None:
    """Rows from tokens, bfloat16; half of the experts resident."""
    tokens, _, top_k = size
    table, _, token_of_row, rows = routing(size)
    slots = tokens * top_k
    measure(
        benchmark,
        Work(
            "gather",
            f"{tokens}x{hidden} top {top_k}",
            least_bytes=2 * hidden * (tokens + slots) + 4 * slots,
            flops=0,
            inputs=lambda seed: (random_on_device(seed)(tokens, hidden).bfloat16(),),
            ours=lambda x: (ops.gather(x, table)[:rows],),
            theirs=lambda x: (x[token_of_row],),
            dtype=torch.bfloat16,
        ),
    )


@by_hidden
@by_size
def test_token_kernels_combine(benchmark: Any, size: Size, hidden: int) -> None:
    """The weighted sum per token, bfloat16; half the experts resident."""
    tokens, _, top_k = size
    table, slots, token_of_row, rows = routing(size)

    def theirs(values: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        weighted = values[:rows] * weights.flatten()[slots, None].bfloat16()
        y = torch.zeros(tokens, hidden, dtype=values.dtype, device=values.device)
        return (y.index_add(0, token_of_row, weighted),)

    measure(
        benchmark,
        Work(
            "combine",
            f"{tokens}x{hidden} top {top_k}",
            least_bytes=2 * hidden * (rows + tokens) + 8 * tokens * top_k,
            flops=2 * rows * hidden,
            inputs=lambda seed: (
                random_on_device(seed)(tokens * top_k, hidden).bfloat16(),
                random_on_device(seed + 100)(tokens, top_k),
            ),
            ours=lambda values, weights: (ops.combine(values, weights, table),),
            theirs=theirs,
            dtype=torch.bfloat16,
        ),
    )


@by_hidden
@by_size
def test_token_kernels_combine_backward(benchmark: Any, size: Size, hidden: int) -> None:
    """Gradients of rows and weights, bfloat16; half of the experts resident."""
    tokens, _, top_k = size
    table, slots, token_of_row, rows = routing(size)

    def ours(grad: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        backward = torch.ops.fomoe.combine_backward
        grad_rows, grad_weights = backward(grad, values, weights, table.row_of_slot)
        return grad_rows[:rows], grad_weights

    def theirs(grad: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        spread = grad[token_of_row]
        dots = (spread.float() * values[:rows].float()).sum(1)
        grad_weights = torch.zeros(tokens * top_k, device=grad.device).index_copy(0, slots, dots)
        scaled = spread * weights.flatten()[slots, None]
        return scaled.bfloat16(), grad_weights.view(tokens, top_k)

    measure(
        benchmark,
        Work(
            "combine backward",
            f"{tokens}x{hidden} top {top_k}",
            least_bytes=2 * hidden * (tokens + rows + tokens * top_k) + 12 * tokens * top_k,
            flops=3 * rows * hidden,
            inputs=lambda seed: (
                random_on_device(seed)(tokens, hidden).bfloat16(),
                random_on_device(seed + 100)(tokens * top_k, hidden).bfloat16(),
                random_on_device(seed + 200)(tokens, top_k),
            ),
            ours=ours,
            theirs=theirs,
            dtype=torch.bfloat16,
        ),
    )
