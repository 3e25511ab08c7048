"""Adds the option --full, and prints the results of the benchmarks as tables at the end."""

from __future__ import annotations

import os
from typing import Any

import bench_checkpoint
import bench_dispatch
import common
import outer_tables
import torch
from rich.console import Console
from rich.table import Table

from fomoe_ext import _C

WANTED_OF_BLOCKS = {"eager": 1.3, "grouped_mm": 1.2}
WANTED_RATIO, WANTED_FRACTION, WANTED_HALF, WANTED_SHARE = 1.3, 0.85, 1.8, 0.10


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--full", action="store_true", help="also all-reduce 256 MB and 1 GB")


def share_of_verbs(case: common.Case) -> float | None:
    """Fraction of the layer's time in route, compact and combine, with their backward passes."""
    shape, _, residency = case
    verbs = [
        common.verb_results.get(("route", (shape, torch.float32, "all"))),
        common.verb_results.get(("compact", (shape, torch.float32, residency))),
        common.verb_results.get(("combine", case)),
    ]
    if not all(verbs):
        return None
    route, compact, combine = (verb["seconds"] for verb in verbs if verb)
    layer = common.layer_results[case]["seconds"]  # includes compact and combine, but not route
    return (route + compact + combine) / (route + layer)


def half_speed_up(case: common.Case) -> float | None:
    """Time with all experts resident over time with half of them resident."""
    full = common.layer_results.get((*case[:2], "all"))
    if case[2] == "all" or full is None:
        return None
    return full["seconds"] / common.layer_results[case]["seconds"]


def mark(value: float | None, good: bool, text: str) -> str:
    """The formatted number, with a * if it misses the target."""
    if value is None:
        return "-"
    return format(value, text) + ("" if good else "*")


def layer_table() -> Table:
    table = Table(title="expert layer, forward + backward (GFLOP/s; x = our rate over the rival's)")
    for name in ("shape", "dtype", "resident", "ms", "GFLOP/s", "of dense", "loop", "grouped_mm"):
        table.add_column(name, justify="left" if name in ("shape", "dtype") else "right")
    table.add_column("all/half", justify="right")
    table.add_column("route + compact + combine", justify="right")
    for case, r in common.layer_results.items():
        rate, dense = r["flops_per_second"], r["dense_flops_per_second"]
        rivals = [r["loop_flops_per_second"], r["grouped_mm_flops_per_second"]]
        fast = rate >= min(WANTED_RATIO * max(rivals), WANTED_FRACTION * dense)
        speed_up, share = half_speed_up(case), share_of_verbs(case)
        few = "" if r["rival_tokens"] == case[0].tokens else f" T={r['rival_tokens']:.0f}"
        table.add_row(
            str(case[0]),
            common.dtype_name(case[1]),
            case[2],
            f"{r['seconds'] * 1e3:.0f}",
            mark(rate / 1e9, fast, ".0f"),
            f"{rate / dense:.0%} of {dense / 1e9:.0f}",
            *(f"{rival / 1e9:.1f} ({rate / rival:.2f}x){few}" for rival in rivals),
            mark(speed_up, (speed_up or 9) >= WANTED_HALF, ".2f"),
            mark(share, (share or 0) < WANTED_SHARE, ".1%"),
        )
    return table


def verb_table() -> Table:
    table = Table(title="route and combine with backward, compact (x = torch's time over ours)")
    for name in ("verb", "shape", "dtype", "resident", "ms", "of bandwidth", "torch ops"):
        table.add_column(name, justify="left" if name in ("verb", "shape", "dtype") else "right")
    for (verb, case), r in common.verb_results.items():
        table.add_row(
            verb,
            str(case[0]),
            common.dtype_name(case[1]),
            case[2],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['fraction_of_floor']:.0%}",
            f"{r['torch_seconds'] * 1e3:.2f} ms ({r['torch_seconds'] / r['seconds']:.1f}x)",
        )
    return table


def token_table() -> Table:
    table = Table(title="kernels around the expert GEMMs (x = a rival's time over ours)")
    for name in ("device", "verb", "shape"):
        table.add_column(name)
    for name in ("us", "bytes us", "flops us", "GB/s", "of copy", "torch", "compiled", "suspect"):
        table.add_column(name, justify="right")
    for r in common.token_results:
        rate = r["memory_floor_seconds"] * r["copy_bytes_per_second"] / r["seconds"]
        compiled = r.get("compiled_seconds")
        table.add_row(
            r["gpu"]["name"] if "gpu" in r else r["device"],
            r["verb"],
            r["shape"],
            f"{r['seconds'] * 1e6:.1f}",
            f"{r['memory_floor_seconds'] * 1e6:.2f}",
            f"{r['compute_floor_seconds'] * 1e6:.2f}",
            f"{rate / 1e9:.2f}",
            f"{r['fraction_of_floor']:.0%}",
            f"{r['torch_seconds'] / r['seconds']:.1f}x",
            "-" if compiled is None else f"{compiled / r['seconds']:.1f}x",
            "; ".join(r["suspect"]) or "no",
        )
    return table


def hf_table() -> Table:
    table = Table(title="converted OLMoE block, forward + backward (x = a rival's time over ours)")
    for name in ("block", "dtype"):
        table.add_column(name)
    for name in ("ms", "flops ms", "bytes ms", "of floor", *WANTED_OF_BLOCKS):
        table.add_column(name, justify="right")
    for r in common.hf_results:
        ratios = {name: r["rivals"][name] / r["seconds"] for name in WANTED_OF_BLOCKS}
        table.add_row(
            r["case"],
            r["dtype"],
            f"{r['seconds'] * 1e3:.0f}",
            f"{r['compute_floor_seconds'] * 1e3:.0f}",
            f"{r['memory_floor_seconds'] * 1e3:.0f}",
            f"{r['fraction_of_floor']:.0%}",
            *(mark(x, x >= WANTED_OF_BLOCKS[name], ".2f") for name, x in ratios.items()),
        )
    return table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    console = Console(width=None if os.isatty(1) else 160)
    if common.layer_results:
        console.print(layer_table())
        console.print(
            f"* misses its target. Rate: {WANTED_RATIO}x the better rival's or "
            f"{WANTED_FRACTION:.0%} of the dense rate, whichever is less. all/half, the time with "
            f"all experts resident over that with half: {WANTED_HALF}x. route + compact + combine: "
            f"less than {WANTED_SHARE:.0%} of the time. Medians of interleaved rounds. Dense: a "
            f"square torch.matmul of size {common.DENSE_SIZE} in the same rounds, in fp32 if that "
            "is faster. T=: a slow rival computed only so many tokens."
        )
    if common.verb_results:
        console.print(verb_table())
    if common.token_results:
        console.print(token_table())
        copy = common.token_results[0]["copy_bytes_per_second"]
        console.print(
            f"bytes us, flops us: two lower bounds on time. of copy: our bandwidth over that of "
            f"{common.token_results[0]['copy_call']} in the same run, {copy / 1e9:.1f} GB/s read "
            "and written.",
            highlight=False,
        )
        for r in common.token_results:
            if r["compiled_failed"]:
                reason = r["compiled_failed"]
                console.print(f"{r['verb']} {r['shape']}: no compiled rival, {reason}")
    if common.hf_results:
        console.print(hf_table())
        wanted = ", ".join(f"{x}x {name}" for name, x in WANTED_OF_BLOCKS.items())
        console.print(f"* misses the target: {wanted}. Rivals are the block's own implementations.")
    outer_tables.show(console)
    bench_dispatch.show(console)
    bench_checkpoint.show(console)
    if common.layer_results or common.verb_results:
        console.print(
            f"{torch.get_num_threads()} threads, {_C.cpu_features()['chosen']}, torch "
            f"{torch.__version__}, memory {common.memory_bandwidth() / 1e9:.1f} GB/s"
        )
