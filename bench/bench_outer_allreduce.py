"""The whole all-reduce in real processes, with slow links and without: ours by codec, and Gloo's.

Every case starts its sites by `python -m fomoe_ext.link`, which says who shapes the link; the sites
(outer_site.py) measure all methods in turn. What pytest-benchmark times is the whole case; the
figures are in extra_info and in the tables. --full adds vectors of 256 MB and 1 GB, and more links.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import machine
import outer_cases
import pytest
from outer_cases import LINK_CASES, LinkCase

TIMEOUT_S = 900
SITE = Path(__file__).with_name("outer_site.py")


def available_memory() -> int:
    """Bytes that may still be taken; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    facts = dict(line.split(":", 1) for line in lines)
    return 1024 * int(facts["MemAvailable"].split()[0])


def run_sites(case: LinkCase, folder: Path) -> dict[str, Any]:
    """Starts the sites, waits for them, returns what site 0 found. RuntimeError when one fails."""
    arguments = ("--numel", str(case.numel), "--rounds", str(case.rounds))
    return outer_cases.run_processes(
        SITE, case.sites, folder, *arguments, link=case.link, timeout_s=TIMEOUT_S
    )


@pytest.mark.parametrize("case", LINK_CASES, ids=str)
def test_outer_allreduce(benchmark: Any, request: Any, tmp_path: Path, case: LinkCase) -> None:
    """All methods, one number of sites, one link, one size."""
    if case.full and not request.config.getoption("--full"):
        pytest.skip("only with --full")
    if 0 < available_memory() < case.memory:
        pytest.skip(f"needs {case.memory >> 20} MiB, {available_memory() >> 20} are available")
    watch, load = machine.Watch("cpu"), outer_cases.load()
    found = benchmark.pedantic(lambda: run_sites(case, tmp_path), rounds=1)
    result = {"case": case._asdict(), "load": load, **found}
    benchmark.extra_info.update(result, machine=watch.facts())
    for name, method in found["methods"].items():
        assert method["equal_bits"], f"{name}: sites ended with different bits"
    outer_cases.allreduce_results.append(result)
