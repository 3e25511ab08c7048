"""Budgets of the host: how many operators a forward and a backward pass of a layer dispatch."""

from __future__ import annotations

import host_cases
import pytest
import torch
from host_cases import CASES, Pass, operators

pytestmark = pytest.mark.usefixtures("one_thread")

# Of forward and backward: operators that reach a kernel, those of them that are no views, and all
# that the profiler records. Bounds, reached exactly with torch 2.13: a new operator fails.
BUDGET = {
    "sigmoid": (7, 12, 9, 43),
    "softmax": (7, 12, 9, 43),
    "bias": (9, 12, 10, 46),
    "switch": (19, 20, 26, 84),
    "switch sigmoid": (20, 21, 28, 92),
    "switch z": (24, 30, 39, 135),
    "entropy": (18, 23, 28, 93),
    "half": (7, 12, 9, 43),
    "half rescale": (24, 25, 39, 105),
    "half resident": (7, 12, 9, 43),
    "shared": (15, 31, 23, 115),
}
CASTS = (2, 2, 4, 12)
"""More for bf16: x and the router's weight in fp32, and their gradients in bf16."""


def test_every_case_has_a_budget() -> None:
    assert BUDGET.keys() == CASES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_operators_of_a_layer_are_within_their_budget(case: str, dtype: torch.dtype) -> None:
    found = operators(Pass(CASES[case], dtype))
    counts = (found.forward.total(), found.backward.total(), found.computing, found.recorded)
    casts = CASTS if dtype == torch.bfloat16 else (0,) * 4
    allowed = tuple(one + more for one, more in zip(BUDGET[case], casts, strict=True))
    over = [count > limit for count, limit in zip(counts, allowed, strict=True)]
    assert not any(over), f"{counts} over {allowed}: {found.forward} {found.backward}"


def test_statistics_that_nobody_reads_cost_nothing() -> None:
    one = Pass({})
    with torch.no_grad():
        one.forward()
        quiet = host_cases._Dispatched()
        with quiet:
            one.forward()
        read = host_cases._Dispatched()
        with read:
            one.forward()
            one.layer.stats.measured()
    assert len(quiet.found) == 7 < len(read.found)


def test_a_case_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cases, "REPEATS", 1)
    monkeypatch.setattr(host_cases, "ROUNDS", 1)
    found = host_cases.host_seconds(Pass({}))
    assert found.keys() == {"forward", "backward"} and found["forward"] > 0
