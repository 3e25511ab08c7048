"""The tables of the benchmarks of codecs and of the all-reduce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import outer_cases
from rich.console import Console
from rich.table import Table

from fomoe_ext.config.links import parse_link
from fomoe_ext.launch import processes as launch

WANTED_FRACTION = {"cpu": 0.60, "cuda": 0.75}  # fraction of the floor when encoding int8
WANTED_ERROR = {"int8": 0.007}  # relative error of the mean of 8 sites
WANTED_SHARE = {"200mbit": 0.90}  # fraction of the link's bandwidth
BASE = "gloo fp32"

Result = dict[str, Any]


def mark(text: str, good: bool) -> str:
    """The text, with a * if the figure misses the target."""
    return text + ("" if good else "*")


def columns(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


# ---- codecs --------------------------------------------------------------------------------------


def fraction_is_good(result: Result) -> bool:
    """Whether the target is met; only the encoding verbs of int8 have one."""
    asked = result["codec"] == "int8" and result["verb"].startswith("encode")
    return not asked or result["fraction_of_floor"] >= WANTED_FRACTION[result["device"]]


def codec_table(results: Sequence[Result]) -> Table:
    title = "codecs, 16M values, 4 members (x = a rival's time over ours)"
    right = ("ms", "floor ms", "of floor", "values GB/s", "rivals")
    table = columns(title, ("verb", "codec"), right)
    for r in results:
        rivals = (f"{name} {s / r['seconds']:.1f}x" for name, s in r["rivals"].items())
        table.add_row(
            r["verb"],
            r["codec"],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['memory_floor_seconds'] * 1e3:.2f}",
            mark(f"{r['fraction_of_floor']:.0%}", fraction_is_good(r)),
            f"{4 * (1 << 24) / r['seconds'] / 1e9:.1f}",
            ", ".join(rivals) or "-",
        )
    return table


def absent_lines(results: Sequence[Result]) -> list[str]:
    """A line for each missing rival with the reason, without duplicates."""
    reasons = {(r["codec"], name): why for r in results for name, why in r["absent"].items()}
    found: dict[str, str] = {}
    for (codec, name), why in reasons.items():
        found.setdefault(f"{name} ({why})", codec)
    return [f"no rival {what}" for what in found]


def error_table(results: Sequence[Result]) -> Table:
    title = "relative L2 error of the mean of 8 sites, without error feedback"
    table = columns(title, ("codec",), ("ours", "ring", "ring/ours"))
    for r in results:
        wanted = WANTED_ERROR.get(r["codec"], math.inf)
        ratio = f"{r['ring'] / r['ours']:.2f}x" if r["codec"] != "fp32" else "-"
        ours = mark(f"{r['ours']:.2%}", r["ours"] <= wanted)
        table.add_row(r["codec"], ours, f"{r['ring']:.2%}", ratio)
    return table


# ---- all-reduce ----------------------------------------------------------------------------------


def median_of(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def case_cells(result: Result) -> tuple[str, str, str]:
    case = result["case"]
    return case["link"] or "unshaped", str(case["sites"]), str(4 * case["numel"] >> 20)


_CASE = ("link", "sites", "MB")


def time_table(results: Sequence[Result], methods: Sequence[str]) -> Table:
    table = columns("all-reduce: seconds (MB/s of fp32)", _CASE, methods)
    for result in results:
        cells = []
        for name in methods:
            seconds = median_of(result["methods"][name]["seconds"])
            cells.append(f"{seconds:.3f} ({4e-6 * result['case']['numel'] / seconds:.0f})")
        table.add_row(*case_cells(result), *cells)
    return table


def share_table(results: Sequence[Result], methods: Sequence[str]) -> Table:
    """How much of the link was used, for the cases with a slow link."""
    table = columns("used fraction of the link's bandwidth", (*_CASE, "made slow by"), methods)
    for result in results:
        link = result["case"]["link"]
        bandwidth, wanted = parse_link(link).bandwidth, WANTED_SHARE.get(link, 0.0)
        cells = []
        for name in methods:
            method = result["methods"][name]
            seconds = median_of(method["seconds"])
            share = outer_cases.link_share(method["bytes_sent"], seconds, bandwidth)
            cells.append(mark(f"{share:.0%}", share >= wanted or name.startswith("gloo")))
        words = result["link"].partition(": ")[2]
        table.add_row(*case_cells(result), words.partition(" (")[0], *cells)
    return table


def bandwidth_words(value: float) -> str:
    if value in (0.0, math.inf):
        return "always" if value else "never"
    return f"{value / 1e9:.2f} Gbit/s" if value >= 1e9 else f"{value / 1e6:.0f} Mbit/s"


def crossover_table(results: Sequence[Result], methods: Sequence[str]) -> Table:
    """For the cases without a slow link: the bandwidth below which a method is faster than Gloo in
    fp32, CPU seconds, and the error of the mean."""
    title = "without a slow link: faster than Gloo fp32 below; CPU seconds of a site; error of mean"
    table = columns(title, _CASE, methods)
    for result in results:
        base = result["methods"][BASE]
        cells = []
        for name in methods:
            method = result["methods"][name]
            costs = [(median_of(m["seconds"]), m["bytes_sent"]) for m in (method, base)]
            words = "-" if name == BASE else bandwidth_words(outer_cases.crossover(*costs))
            cells.append(
                f"{words}\n{median_of(method['cpu_seconds']):.3f} s\n{method['error']:.1e}"
            )
        table.add_row(*case_cells(result), *cells)
    return table


def load_line(results: Sequence[Result]) -> str:
    """A warning if other processes used the machine; else, or if that is not known, empty."""
    most = max((r["load"] or 0.0 for r in results), default=0.0)
    cores = launch.cores()
    if most <= cores + 1:  # the load average includes earlier cases of this benchmark
        return ""
    return f"SUSPECT: up to {most:.0f} processes shared {cores} cores; times are not reliable."


def show(console: Console) -> None:
    """Prints the tables of what has been measured."""
    if codecs := outer_cases.codec_results:
        console.print(codec_table(codecs))
        rates = [r["copy_bytes_per_second"] for r in codecs]
        console.print(
            "Floor: each byte read and written once, at the bandwidth of a copy in the same rounds "
            f"({codecs[0]['copy_call']}: {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} GB/s). "
            f"* misses the target for int8: {WANTED_FRACTION[codecs[0]['device']]:.0%}."
        )
        for line in filter(None, [load_line(codecs), *absent_lines(codecs)]):
            console.print(line, markup=False, highlight=False)
    if errors := outer_cases.error_results:
        console.print(error_table(errors))
        console.print(
            "Random deltas: the scales of rows are log-normal, half of the variance is common to "
            "all sites. Ours: reduce-scatter and all-gather (topk: all-gather). Ring: encodes at "
            "every hop."
        )
    if results := outer_cases.allreduce_results:
        methods = list(results[0]["methods"])
        linked = [r for r in results if r["case"]["link"]]
        free = [r for r in results if not r["case"]["link"]]
        console.print(time_table(results, methods))
        if linked:
            console.print(share_table(linked, methods))
            console.print("Bits of payloads over bandwidth x time, without headers of packets.")
        if free:
            console.print(crossover_table(free, methods))
            console.print(
                "Time on a link is taken to be time without one + bits / bandwidth. All sites "
                "share this machine's cores, so they are slower than on separate machines."
            )
        if line := load_line(results[:1]):
            console.print(line)
