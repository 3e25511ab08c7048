"""The all-reduce between sites, in real processes, with and without slow links: ours with each
codec, and Gloo's.

Each case starts its sites with `python -m fomoe_ext.link`, which reports how the link is made slow.
The sites run outer_site.py, which measures all methods in turn. pytest-benchmark times the whole
case; the figures are in extra_info and in the tables. --full adds vectors of 256 MB and 1 GB, and
more links.
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
    """Bytes of free memory; 0 if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    facts = dict(line.split(":", 1) for line in lines)
    return 1024 * int(facts["MemAvailable"].split()[0])


def run_sites(case: LinkCase, folder: Path) -> dict[str, Any]:
    """Runs the sites and returns the results of site 0. RuntimeError when a site fails."""
    arguments = ("--numel", str(case.numel), "--rounds", str(case.rounds))
    return outer_cases.run_processes(
        SITE, case.sites, folder, *arguments, link=case.link, timeout_s=TIMEOUT_S
    )


@pytest.mark.parametrize("case", LINK_CASES, ids=str)
def test_outer_allreduce(benchmark: Any, request: Any, tmp_path: Path, case: LinkCase) -> None:
    """All methods, for one number of sites, one link and one size."""
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
