"""How long a process has run: the system knows, so that imports count too. Needs no torch."""

from __future__ import annotations

import os
import time
from pathlib import Path


def age_of_process() -> float:
    """Seconds since this process started; 0 where the system does not tell (it is no Linux)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the machine's start
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
