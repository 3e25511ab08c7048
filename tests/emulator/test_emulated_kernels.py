"""The CUDA kernels' source under sanitizers and in many schedules: see tests/emulator/README.md."""

from __future__ import annotations

import os

import pytest

import emulator
from emulator.runs import RUNS, first_failure, seeded_runs

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="a C++ compiler is needed")


@pytest.mark.parametrize("sanitize", list(RUNS))
def test_emulated_kernels_agree_with_the_cpu(sanitize):
    """Every kernel, every schedule, no race and no access out of bounds."""
    program = emulator.build_driver(sanitize)
    failure = first_failure(program, RUNS[sanitize])
    assert failure is None, failure


def test_emulated_kernels_agree_in_orders_by_chance():
    """More random orders, for races that few orders show. FOMOE_EMULATOR_BASE_SEED is the first
    seed.
    """
    runs = seeded_runs(int(os.environ.get("FOMOE_EMULATOR_BASE_SEED", "1")), 36)
    failure = first_failure(emulator.build_driver("plain"), runs)
    assert failure is None, failure
