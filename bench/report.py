"""Raw benchmark results -> the tables of docs/performance.md.

    python bench/report.py bench/results/<gpu>*.json > table.md
    python bench/report.py bench/results/<gpu>-experts-<date>.jsonl [--label NAME ...]

Reads JSON of pytest-benchmark: results of bench_experts.py on a GPU and of bench_token_kernels.py.
It prints a section for each file: facts of the machine, then times with two lower bounds
("floors"), the fraction of the larger one that was reached, and the time of every rival over ours
(above 1: we are faster). Of .jsonl files (bench/results/README.md) it prints TFLOP/s and rivals, by
the label of the kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experts_model import BadFile, json_lines, table

Result = dict[str, Any]  # a benchmark's extra_info
LAYERS = ("forward", "forward_backward", "layer")


def read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("benchmarks"), list):
        raise BadFile(
            f"{path} must be a file of pytest-benchmark, got one without a list 'benchmarks'"
        )
    return found


# ---- the machine ---------------------------------------------------------------------------------


def machine_lines(results: Sequence[Result]) -> list[str]:
    """Facts that bench/machine.py recorded with the results, and how many are suspect and why."""
    machines = [result["machine"] for result in results if "machine" in result]
    gpus = [machine["gpu"] for machine in machines if machine.get("gpu")]

    def seen(of: Sequence[dict[str, Any]], key: str) -> str:
        values = sorted({str(each[key]) for each in of if each.get(key) is not None})
        return ", ".join(values) or "unknown"

    def span(key: str) -> str:
        values = [gpu[key] for gpu in gpus if gpu.get(key) is not None]
        if not values:
            return "unknown"
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    device = seen(gpus, "name") if gpus else seen(machines, "device")
    lines = [
        f"* device: {device}, driver {seen(gpus, 'driver')}" if gpus else f"* device: {device}"
    ]
    if gpus:
        lines.append(
            f"* after each measurement: {span('sm_clock_mhz')} MHz (at most "
            f"{span('max_sm_clock_mhz')}), memory {span('memory_clock_mhz')} MHz, "
            f"{span('power_watts')} W (limit {span('power_limit_watts')}), "
            f"{span('temperature_celsius')} °C"
        )
    versions = f"torch {seen(machines, 'torch')}, CUDA {seen(machines, 'built_with_cuda')}"
    lines.append(f"* commit {seen(machines, 'commit')}, {versions}")
    doubts: dict[str, int] = defaultdict(int)
    for machine in machines:
        for doubt in machine.get("suspect", []):
            doubts[doubt] += 1
    lines += [f"* suspect: {doubt} ({count} results)" for doubt, count in sorted(doubts.items())]
    return lines


# ---- figures -------------------------------------------------------------------------------------


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def rival_names(results: Sequence[Result]) -> list[str]:
    """Names of rivals that were measured in any of the results, in order of appearance."""
    return list(dict.fromkeys(name for result in results for name in result["rivals"]))


def floor_cells(result: Result) -> list[str]:
    return [
        microseconds(result["seconds"]),
        microseconds(result["compute_floor_seconds"]),
        microseconds(result["memory_floor_seconds"]),
        f"{result['fraction_of_floor']:.2f}",
    ]


FLOOR_HEAD = ("µs", "FLOPs floor µs", "bytes floor µs", "of floor")


def case_cells(result: Result) -> list[str]:
    return [
        result["model"]["name"],
        str(result["tokens"]),
        result["routing"],
        result["task"],
        *floor_cells(result),
        f"{result['flops_per_second'] / 1e12:.0f}",
        f"{result['dense_flops_per_second'] / 1e12:.0f}",
    ]


CASE_HEAD = ("model", "tokens", "routing", "what", *FLOOR_HEAD, "TFLOP/s", "dense 8192³ TFLOP/s")


def rival_cells(result: Result, names: Sequence[str]) -> list[str]:
    of = lambda name: result["rivals"].get(name, {}).get("ratio")
    return [ratio(of(name)) for name in names]


def part_cells(result: Result) -> list[str]:
    """Times of variants over ours: in a CUDA graph, and with half or a quarter of the experts."""
    share = lambda name: result.get(f"{name}_seconds")
    over = lambda seconds: "-" if seconds is None else f"{seconds / result['seconds']:.2f}"
    return [microseconds(share("graph")), over(share("half")), over(share("quarter"))]


def memory_cells(result: Result) -> list[str]:
    """Peak GB without the gradients of weights: ours, that of grouped_mm, and the ratio."""
    memory = result.get("memory") or {}
    ours, theirs = (
        (memory.get(name) or {}).get("peak_without_weight_gradients")
        for name in ("ours", "grouped_mm")
    )
    cells = ["-" if size is None else f"{size / 1e9:.2f}" for size in (ours, theirs)]
    return [*cells, f"{ours / theirs:.2f}" if ours and theirs else "-"]


def experts_tables(results: Sequence[Result]) -> list[str]:
    tables = []
    products = [result for result in results if result["task"] not in LAYERS]
    if products:
        names = rival_names(products)
        tile = lambda result: result.get("tiles", {}).get(result["task"], "-")
        rows = [[*case_cells(r), tile(r), *rival_cells(r, names)] for r in products]
        tables.append(table("Grouped GEMMs", (*CASE_HEAD, "tile", *names), rows, True))
    layers = [result for result in results if result["task"] in LAYERS]
    if layers:
        names = rival_names(layers)
        rows = [
            [*case_cells(r), *rival_cells(r, names), *part_cells(r), *memory_cells(r)]
            for r in layers
        ]
        head = (*CASE_HEAD, *names, "in a graph µs", "half / all", "quarter / all")
        head += ("peak GB", "grouped_mm peak GB", "peak ratio")
        tables.append(table("Layers", head, rows, True))
    return tables


def absent_lines(results: Sequence[Result]) -> list[str]:
    """Rivals and variants that could not be measured, and why."""
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for result in results:
        for name, reason in result.get("absent", {}).items():
            reasons[name, reason] += 1
    return [f"* no {name} in {n} results: {why}" for (name, why), n in sorted(reasons.items())]


def token_table(named: Sequence[tuple[str, Result]]) -> str:
    rows = [
        [
            name.removeprefix("test_token_kernels_"),
            *floor_cells(result),
            f"{result['copy_bytes_per_second'] / 1e9:.0f}",
            *(
                ratio(seconds and seconds / result["seconds"])
                for seconds in (result.get("torch_seconds"), result.get("compiled_seconds"))
            ),
        ]
        for name, result in named
    ]
    head = ("kernel", *FLOOR_HEAD, "copy GB/s", "torch", "compiled")
    return table("Kernels around the grouped GEMMs", head, rows, True)


def section(path: Path) -> str:
    """The section of a pytest-benchmark file."""
    found = read(path)
    named = [(b.get("name", "?"), b.get("extra_info", {})) for b in found["benchmarks"]]
    is_experts: Callable[[Result], bool] = lambda result: "task" in result and "rivals" in result
    experts = [result for _, result in named if is_experts(result)]
    tokens = [(name, result) for name, result in named if name.startswith("test_token_kernels_")]
    tokens = [(name, result) for name, result in tokens if "seconds" in result]
    shown = [*experts, *(result for _, result in tokens)]
    lines = [f"### {path.name}", ""]
    if shown:
        lines += [*machine_lines(shown), ""]
    lines += experts_tables(experts)
    if tokens:
        lines.append(token_table(tokens))
    if absent := absent_lines(experts):
        lines += [*absent, ""]
    if left := len(named) - len(shown):
        lines += [f"{left} results of other benchmarks are not shown.", ""]
    return "\n".join(lines)


# ---- .jsonl files --------------------------------------------------------------------------------


def verb_cells(line: Result) -> list[str]:
    seconds = line["seconds"]
    rate = lambda name: f"{line['flops'] / seconds[name] / 1e12:.0f}" if name in seconds else "-"
    over = lambda name: ratio(seconds[name] / seconds["default"] if name in seconds else None)
    rates = [rate(name) for name in ("default", "dense", "grouped_mm")]
    case = [line["label"], line["model"], str(line["tokens"]), line["routing"], line["verb"]]
    return [*case, microseconds(seconds["default"]), *rates, over("dense"), over("grouped_mm")]


VERB_HEAD = ("kernels", "model", "tokens", "routing", "GEMM", "µs", "TFLOP/s")
VERB_HEAD += ("cuBLAS TFLOP/s", "grouped_mm TFLOP/s", "cuBLAS", "grouped_mm")


def layer_cells(line: Result) -> list[str]:
    seconds, peak = line["seconds"], line["peak"]
    ours, theirs = seconds["ours"], peak.get("grouped_mm")
    share = lambda name: f"{seconds[name] / ours:.2f}" if name in seconds else "-"
    return [
        *(line["label"], line["model"], str(line["tokens"]), line["routing"]),
        "forward + backward" if line["backward"] else "forward",
        microseconds(ours),
        f"{line['flops'] / ours / 1e12:.0f}",
        ratio(seconds["grouped_mm"] / ours),
        *map(share, ("graph", "1/2", "1/4")),
        f"{peak['ours'] / theirs:.2f}" if theirs else "-",
    ]


LAYER_HEAD = ("kernels", "model", "tokens", "routing", "pass", "µs", "TFLOP/s", "grouped_mm")
LAYER_HEAD += ("CUDA graph / eager", "half / all", "quarter / all", "peak memory / grouped_mm")


def lines_section(path: Path, labels: Sequence[str]) -> str:
    """The section of a .jsonl file; of all labels if none is given."""
    found = [line for line in json_lines(path) if not labels or line["label"] in labels]
    if not found:
        raise BadFile(f"{path} has no line with the label {' or '.join(map(repr, labels))}")
    squares = [line["square"] / 1e12 for line in found if line["kind"] == "ceilings"]
    parts = [f"### {path.name}", ""]
    if squares:
        said = f"{min(squares):.0f} to {max(squares):.0f} TFLOP/s"
        parts += [f"Dense GEMMs of 8192 x 8192 x 8192 in the same processes: {said}.", ""]
    for kind, title, head, cells in (
        ("verb", "Grouped GEMMs", VERB_HEAD, verb_cells),
        ("layer", "Experts of a layer", LAYER_HEAD, layer_cells),
    ):
        rows = [cells(line) for line in found if line["kind"] == kind]
        if rows:
            parts.append(table(title, head, rows, True))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="results.json")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        help="of .jsonl files: show only lines with this label; can be repeated",
    )
    arguments = parser.parse_args()
    try:
        sections = [
            lines_section(path, arguments.label) if path.suffix == ".jsonl" else section(path)
            for path in arguments.files
        ]
    except BadFile as bad:
        parser.error(str(bad))
    print("\n".join(sections).rstrip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
