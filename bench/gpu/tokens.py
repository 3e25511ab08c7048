"""Kernels around the grouped GEMMs, and codecs of deltas, against the bandwidth of a copy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import bench_token_kernels as token_kernels
import common
import outer_cases
import torch
from torch import Tensor

from bench.gpu import measured
from bench.gpu.measured import Results
from fomoe_ext import ops
from fomoe_ext.outer.codec import Codec

Call = Callable[[], Any]
SIZES = {  # tokens, experts, slots per token, hidden size
    "cuda": (
        (4096, 128, 8, 2048),
        (16384, 64, 8, 2048),
        (65536, 128, 8, 2048),
        (65536, 256, 8, 2048),
        (65536, 32, 4, 2880),
    ),
    "cpu": ((64, 16, 4, 32),),
}
NUMEL = {"cuda": 1 << 28, "cpu": 1 << 14}  # values of a delta
CALLS = 10  # calls in a CUDA graph, because a single one is too short to be timed


def seconds_of(calls: dict[str, Call], device: str) -> dict[str, float]:
    """Seconds of each call, timed in turn; on a GPU without the host's time."""
    if device == "cpu":
        return common.interleaved_seconds(calls, device, measured.ROUNDS[device])

    def repeated(call: Call) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):  # each result makes room for the next
                call()

        return run

    graphs = {name: common.captured(repeated(call)) for name, call in calls.items()}
    seconds = common.interleaved_seconds(graphs, device, measured.ROUNDS[device])
    return {name: value / CALLS for name, value in seconds.items()}


def result_of(
    seconds: dict[str, float], least_bytes: int, flops: int, copy_rate: float
) -> dict[str, Any]:
    """The result as bench/report.py expects it."""
    own = seconds["ours"]
    memory_floor = least_bytes / copy_rate
    return {
        "seconds": own,
        "least_bytes": least_bytes,
        "memory_floor_seconds": memory_floor,
        "compute_floor_seconds": flops / token_kernels.compute_rate(),
        "fraction_of_floor": memory_floor / own,
        "copy_bytes_per_second": copy_rate,
        **{f"{name}_seconds": value for name, value in seconds.items() if name != "ours"},
    }


def measure_tokens(results: Results, size: tuple[int, int, int, int], device: str) -> int:
    """route, route with bias and statistics, compact, route + compact, gather and combine."""
    tokens, experts, top_k, hidden = size
    copy_rate, slots = token_kernels.copy_bandwidth(), tokens * top_k
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator, device=device)
    logits, bias = draw(tokens, experts), 0.01 * draw(experts)
    weights, chosen = ops.route(logits, top_k)
    index = torch.arange(experts, dtype=torch.int32, device=device)
    compact = lambda chosen: ops.compact(chosen, index, experts, ops.TILE_ROWS)
    table = compact(chosen)
    x, rows = draw(tokens, hidden).bfloat16(), draw(slots, hidden).bfloat16()
    token_of_row = table.token_of_row.long()

    def torch_route() -> tuple[Tensor, Tensor]:
        best, which = logits.sigmoid().topk(top_k, dim=1)
        return best, which.int()

    route_bytes, d = logits.nbytes + 8 * slots, 2 * hidden
    work: dict[str, tuple[int, int, dict[str, Call]]] = {
        "route": (
            route_bytes,
            tokens * experts,
            {"ours": lambda: ops.route(logits, top_k), "torch": torch_route},
        ),
        "route with bias and statistics": (
            route_bytes,
            2 * tokens * experts,
            {"ours": lambda: ops.route(logits, top_k, selection_bias=bias, return_statistics=True)},
        ),
        "compact": (16 * slots, 0, {"ours": lambda: compact(chosen)}),
        "route + compact": (
            route_bytes + 12 * slots,
            tokens * experts,
            {"ours": lambda: compact(ops.route(logits, top_k)[1])},
        ),
        "gather": (
            d * (tokens + slots) + 4 * slots,
            0,
            {"ours": lambda: ops.gather(x, table), "torch": lambda: x[token_of_row]},
        ),
        "combine": (
            d * (slots + tokens) + 8 * slots,
            2 * slots * hidden,
            {"ours": lambda: ops.combine(rows, weights, table)},
        ),
    }
    done = 0
    for verb, (least_bytes, flops, calls) in work.items():
        if results.enough(f"{verb} {size}", 1.0):
            result = result_of(seconds_of(calls, device), least_bytes, flops, copy_rate)
            name = f"{tokens}x{experts}-top{top_k}-{hidden}"
            facts = {"verb": verb, "tokens": tokens, "experts": experts}
            results.add(f"test_token_kernels_{verb}[{name}]", result | facts)
            done += 1
    return done


def measure_codec(results: Results, name: str, device: str) -> int:
    """The four verbs of a codec."""
    numel, done = NUMEL[device], 0
    codec = Codec(name)
    work = outer_cases.Work.make(codec, numel, device)
    target = torch.empty_like(work.given[0])
    for verb in outer_cases.VERBS:
        if not results.enough(f"{name} {verb}", 1.0):
            continue
        calls = {"ours": work.ours(verb), "copy": lambda: target.copy_(work.given[0])}
        seconds = common.interleaved_seconds(calls, device, measured.ROUNDS[device])
        copy_rate = 2 * target.nbytes / seconds.pop("copy")
        least_bytes = outer_cases.least_bytes(verb, codec, numel)
        result = result_of(seconds, least_bytes, 0, copy_rate)
        facts = {"verb": verb, "codec": name, "numel": numel}
        results.add(f"test_token_kernels_codec[{name} {verb}]", result | facts)
        done += 1
    return done


def main() -> int:
    given = measured.arguments(__doc__)
    results, device, done = Results(given.out, given.budget), given.device, 0
    for size in SIZES[device]:
        with results.guarded(size):
            done += measure_tokens(results, size, device)
    for name in outer_cases.CODECS:
        measured.release_memory()
        if results.enough(f"codec {name}"):
            with results.guarded(f"codec {name}"):
                done += measure_codec(results, name, device)
    return results.finish(f"{done} kernels measured")


if __name__ == "__main__":
    sys.exit(main())
