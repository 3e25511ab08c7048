"""Dispatch between the ranks of a site: bytes and time of a layer, with and without skipped slots.

    pytest bench -k dispatch --benchmark-only

A second benchmark has a router that prefers some experts, with neighbouring ids. It compares chunks
of neighbouring experts per rank with experts spread by their load. Each case starts its ranks with
`python -m fomoe_ext.link`; they run dispatch_site.py, which measures all methods in turn.
pytest-benchmark times the whole case; the figures are in extra_info and in the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import machine
import outer_cases
import pytest
from outer_tables import columns, load_line
from rich.console import Console
from rich.table import Table

TIMEOUT_S = 300
SITE = Path(__file__).with_name("dispatch_site.py")

results: list[dict[str, Any]] = []
skewed_results: list[dict[str, Any]] = []


def _run(benchmark: Any, folder: Path, ranks: int, *arguments: str) -> dict[str, Any]:
    watch, load = machine.Watch("cpu"), outer_cases.load()
    found = benchmark.pedantic(
        lambda: outer_cases.run_processes(SITE, ranks, folder, *arguments, timeout_s=TIMEOUT_S),
        rounds=1,
    )
    result = {"load": load, **found}
    benchmark.extra_info.update(result, machine=watch.facts())
    return result


@pytest.mark.parametrize("ranks", [2, 4])
def test_dispatch(benchmark: Any, tmp_path: Path, ranks: int) -> None:
    """All methods and fractions of skipped slots, for one number of ranks."""
    result = _run(benchmark, tmp_path, ranks)
    for case in result["cases"]:
        sent = {way: facts["bytes_sent"] for way, facts in case["ways"].items()}
        assert sent["ours"] <= min(sent.values())
    results.append(result)


@pytest.mark.parametrize("ranks", [2, 4])
def test_dispatch_skewed(benchmark: Any, tmp_path: Path, ranks: int) -> None:
    """Popular experts with neighbouring ids: chunks, the default, against a spread by load."""
    result = _run(benchmark, tmp_path, ranks, "--skewed")
    cuts = result["cases"][0]["cuts"]
    chunks, spread = (cuts[cut]["largest_rows_over_mean"] for cut in ("chunks", "spread"))
    assert 1 <= spread < chunks
    skewed_results.append(result)


def dispatch_table(found: list[dict[str, Any]]) -> Table:
    title = "dispatch inside a site, one layer, forward + backward; x = over ours"
    right = ("skipped", "MB sent", "exchange ms", "of link", "layer ms", "of floors", "dropped")
    table = columns(title, ("ranks", "rows sent"), right)
    for result in found:
        for case in result["cases"]:
            ours = case["ways"]["ours"]
            for way, facts in case["ways"].items():
                table.add_row(str(result["ranks"]), way, *_cells(case, facts, ours, way))
    return table


def skewed_table(found: list[dict[str, Any]]) -> Table:
    title = "popular experts with neighbouring ids, one layer, forward + backward; x = over chunks"
    right = ("most popular", "most rows / mean", "MB", "layer ms", "busiest CPU ms", "of floors")
    table = columns(title, ("ranks", "experts in"), right)
    for result in found:
        for case in result["cases"]:
            chunks = case["cuts"]["chunks"]
            for cut, facts in case["cuts"].items():
                table.add_row(str(result["ranks"]), cut, *_skewed_cells(case, facts, chunks))
    return table


def _skewed_cells(
    case: dict[str, Any], facts: dict[str, Any], chunks: dict[str, Any]
) -> tuple[str, ...]:
    def over(name: str, scale: float) -> str:
        text = f"{facts[name] * scale:.1f}"
        return text if facts is chunks else f"{text} ({facts[name] / chunks[name]:.2f}x)"

    floor = facts["link_floor_seconds"] + case["compute_floor_seconds"]
    return (
        f"{case['hottest_share']:.0%}",
        f"{facts['largest_rows_over_mean']:.2f}",
        over("bytes_sent", 1e-6),
        over("layer_seconds", 1e3),
        over("busiest_cpu_seconds", 1e3),
        f"{floor / facts['layer_seconds']:.0%}",
    )


def _cells(
    case: dict[str, Any], facts: dict[str, Any], ours: dict[str, Any], way: str
) -> tuple[str, ...]:
    def over(name: str, scale: float) -> str:
        text = f"{facts[name] * scale:.1f}"
        return text if way == "ours" else f"{text} ({facts[name] / ours[name]:.2f}x)"

    floor = facts["link_floor_seconds"]
    return (
        f"{case['skipped']:.0%}",
        over("bytes_sent", 1e-6),
        over("exchange_seconds", 1e3),
        f"{floor / facts['exchange_seconds']:.0%}",
        over("layer_seconds", 1e3),
        f"{(floor + case['compute_floor_seconds']) / facts['layer_seconds']:.0%}",
        f"{case['dropped']:.1%}" if way == "padded" else "-",
    )


def show(console: Console) -> None:
    """Prints the tables of what has been measured."""
    if results:
        console.print(dispatch_table(results))
        console.print(
            f"{_conditions(results)} MB sent: by one rank. Floors: bytes over the rate of an "
            "all_to_all of equal parts, and FLOPs of the experts without padding over the rate of "
            f"torch.matmul, with all ranks busy: {_speeds(results)}. unskipped: all slots are "
            "sent. padded: plain torch, capacity 1.25; dropped: slots beyond the capacity."
        )
    if skewed_results:
        console.print(skewed_table(skewed_results))
        console.print(
            f"{_conditions(skewed_results)} most popular: the fraction of all slots that chose "
            "this expert. MB: of the rank that sends most. Floors: as above, if all ranks had "
            f"equally many rows: {_speeds(skewed_results)}. spread: by the load of other tokens."
        )
    if line := load_line((results or skewed_results)[:1]):
        console.print(line)


def _conditions(found: list[dict[str, Any]]) -> str:
    first = found[0]
    return (
        f"{first['shape']} (tokens per rank x hidden x expert, top-k/experts), fp32, "
        f"{first['threads']} thread(s) per rank with {first['ranks']} ranks."
    )


def _speeds(found: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{r['ranks']} ranks {max(c['link_bytes_per_second'] for c in r['cases']) / 1e9:.2f} GB/s "
        f"and {max(c['dense_flops_per_second'] for c in r['cases']) / 1e9:.0f} GFLOP/s each"
        for r in found
    )
