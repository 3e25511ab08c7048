"""The CUDA kernels' source under sanitizers and in many schedules: see tests/emulator/README.md."""

from __future__ import annotations

import emulator
import pytest
from emulator.runs import RUNS, first_failure

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="a C++ compiler is needed")


@pytest.mark.parametrize("sanitize", list(RUNS))
def test_emulated_kernels_agree_with_the_cpu(sanitize):
    """Every kernel, every schedule, no race and no access out of bounds."""
    program = emulator.build_driver(sanitize)
    failure = first_failure(program, RUNS[sanitize])
    assert failure is None, failure
