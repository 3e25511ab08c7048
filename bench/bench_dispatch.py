"""Dispatch inside a site: volume and time of one layer's exchange, with slots skipped and without.

    pytest bench -k dispatch --benchmark-only

Every case starts its ranks by `python -m fomoe_ext.link`; they (dispatch_site.py) measure all ways
in turn. What pytest-benchmark times is the whole case; the figures are in extra_info and in the
table.
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


@pytest.mark.parametrize("ranks", [2, 4])
def test_dispatch(benchmark: Any, tmp_path: Path, ranks: int) -> None:
    """All ways and shares of skipped slots, one number of ranks."""
    watch, load = machine.Watch("cpu"), outer_cases.load()
    found = benchmark.pedantic(
        lambda: outer_cases.run_processes(SITE, ranks, tmp_path, timeout_s=TIMEOUT_S), rounds=1
    )
    result = {"load": load, **found}
    benchmark.extra_info.update(result, machine=watch.facts())
    for case in found["cases"]:
        sent = {way: facts["bytes_sent"] for way, facts in case["ways"].items()}
        assert sent["ours"] <= min(sent.values())
    results.append(result)


def dispatch_table(found: list[dict[str, Any]]) -> Table:
    title = "dispatch inside a site, one layer, forward + backward; a rank's MB sent; x = over ours"
    right = ("skipped", "MB", "exchange ms", "of link", "layer ms", "of floors", "dropped")
    table = columns(title, ("ranks", "rows sent"), right)
    for result in found:
        for case in result["cases"]:
            ours = case["ways"]["ours"]
            for way, facts in case["ways"].items():
                table.add_row(str(result["ranks"]), way, *_cells(case, facts, ours, way))
    return table


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
    """Prints the table of what has been measured."""
    if not results:
        return
    console.print(dispatch_table(results))
    first = results[0]
    speeds = (
        f"{r['ranks']} ranks {max(c['link_bytes_per_second'] for c in r['cases']) / 1e9:.2f} GB/s "
        f"and {max(c['dense_flops_per_second'] for c in r['cases']) / 1e9:.0f} GFLOP/s each"
        for r in results
    )
    console.print(
        f"{first['shape']} tokens of each rank, fp32, {first['threads']} thread(s) per rank of 2. "
        f"Floors: bytes over the rate of an all_to_all of equal parts, experts' FLOPs of rows not "
        f"padded over the rate of torch.matmul, by all ranks at once: {'; '.join(speeds)}. "
        "Unskipped: all slots travel. Padded: capacity 1.25, plain torch."
    )
    if line := load_line(results[:1]):
        console.print(line)
